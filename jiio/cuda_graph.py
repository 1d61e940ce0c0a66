"""CUDA graphs: a problem's evaluation recorded once in a solve and replayed, so that the GPU never waits for Python."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jiio import tree
from jiio.problem import Problem, State, Sweep
from jiio.tree import Tree

Replay = Callable[[], object]
# Recordings share memory: between a replay and the copy of what it computed no other one may run.
_LOCK = RLock()


def captured(problem: Problem) -> Problem:
    """The same problem, whose sweeps are replayed from a CUDA graph; `problem` itself where there is no GPU.

    For one solve, on one stream: f and cost are recorded with the weights they are bound to, and the context must stay as it
    is. The first evaluation runs as usual, the second is recorded, every further one replayed; when half of the batch is
    finished, the rest is recorded anew. CUDA refuses to record an f or cost that reads a GPU tensor's value in Python
    (`.item()`, `if tensor:`): a warning says so, and the problem is evaluated as usual. A choice that Python makes in another
    way, by a counter say, is recorded as it was made. `solution.map` keeps the recording, and its memory.

    Raises `TypeError` for a subclass of `Problem`, whose own methods would not be recorded.

    >>> plain = Problem(lambda z, x: z.tanh() + x, lambda z, x: z.square().sum(1))
    >>> torch.cuda.is_available() or captured(plain) is plain
    True
    """
    if not torch.cuda.is_available() or isinstance(problem, CapturedProblem):
        return problem
    if type(problem) is not Problem:
        raise TypeError(
            f"captured takes a Problem, not a subclass such as {type(problem).__name__}: solve that as it is"
        )
    return CapturedProblem(**{part.name: getattr(problem, part.name) for part in fields(problem)})


@dataclass(frozen=True)
class CapturedProblem(Problem):
    """A problem that keeps what was recorded of it, also when rows are selected."""

    recordings: Recordings = field(default_factory=lambda: Recordings(), kw_only=True)

    def sweep(self, state: State) -> Sweep:
        """As of `Problem`; tensors of its own, which no later replay writes over."""
        if not self.recorded(state):
            return super().sweep(state)

        def evaluate(state: State, context: tuple[Any, ...]) -> Sweep:
            own = Problem(self.f, self.cost, self.constraint, context, compute_dtype=self.compute_dtype)
            return own.sweep(state)

        return self.recordings(evaluate, state, self.context)

    def recorded(self, state: State) -> bool:
        """Whether evaluations at `state` are recorded: on a GPU."""
        return state.x.is_cuda


class Recordings:
    """The latest recording of a function of (state, context), and whether this number of rows has been met before."""

    def __init__(self) -> None:
        self.recording: Recording | None = None
        self.met, self.refused = 0, False

    def __call__(self, function: Callable[[State, tuple[Any, ...]], Sweep], state: State, context: Any) -> Sweep:
        """function(state, context), as usual or replayed."""
        with _LOCK:
            return self._evaluated(function, state, context)

    def _evaluated(self, function: Callable[[State, tuple[Any, ...]], Sweep], state: State, context: Any) -> Sweep:
        rows = len(state.x)
        if self.recording is not None and rows <= self.recording.rows < 2 * rows:
            return self.recording(state, context)
        self.recording = None
        # as usual, once: kernels are loaded and algorithms chosen, which can't be recorded
        if self.refused or self.met != rows:
            self.met = rows
            return function(state, context)
        try:
            self.recording = Recording(function, state, context)
        except RuntimeError as error:
            self.refused = True
            warnings.warn(
                "f or cost can't be captured, for it reads a tensor's value in Python or copies from the CPU; they are "
                f"evaluated as usual: {str(error).splitlines()[0]}",
                stacklevel=2,
            )
            return function(state, context)
        return self.recording(state, context)


class Recording:
    """A recorded function, for up to `rows` samples. With fewer, the other rows keep old values, which no one reads."""

    def __init__(self, function: Callable[[State, Any], Sweep], state: State, context: Any):
        self.rows = len(state.x)
        self.state, self.context = tree.apply(_copy, state), tree.apply(_copy, context)
        self.filled = context
        self.outputs, self.replay = record(lambda: function(self.state, self.context), state.x.device)

    def __call__(self, state: State, context: Any) -> Sweep:
        """The function's values at `state`."""
        rows = len(state.x)
        _fill(self.state, state, rows)
        if context is not self.filled:
            _fill(self.context, context, rows)
            self.filled = context
        self.replay()
        return tree.apply(lambda leaf: leaf[:rows].clone(), self.outputs)


def record(function: Callable[[], Tree], device: torch.device) -> tuple[Tree, Replay]:
    """The tensors that `function` returns, and what computes them again in place from the tensors that it read, all on
    `device`."""
    with torch.cuda.device(device):  # a stream records what is launched on its own device alone
        graph, shared = torch.cuda.CUDAGraph(), _shared(torch.cuda.current_device())
        try:
            outputs = _recorded(graph, shared.stream, function, pool=shared.anchor.pool())
        except BaseException:
            _shared.cache_clear()  # stream and pool are of no more use after a recording that failed
            raise
    return outputs, graph.replay


class _Shared(NamedTuple):
    """What the recordings of a device share. They are replayed one after the other, so that one takes the memory that the
    last has left; the anchor, a recording of next to nothing, keeps it from being handed back between them."""

    stream: torch.cuda.Stream  # one, for every stream has workspaces of its own
    anchor: torch.cuda.CUDAGraph


@cache
def _shared(device: int) -> _Shared:
    buffer = torch.zeros(1, device=f"cuda:{device}")
    shared = _Shared(torch.cuda.Stream(device), torch.cuda.CUDAGraph())
    _recorded(shared.anchor, shared.stream, lambda: buffer.add_(1))
    return shared


def _recorded(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, function: Callable[[], Tree], **pool: Any
) -> Tree:
    stream.wait_stream(torch.cuda.current_stream())
    # not `torch.cuda.graph`, which hands all cached memory back first: as slow as a solve
    with torch.cuda.stream(stream):
        graph.capture_begin(**pool)
        try:
            outputs = function()
        except BaseException:  # an interrupt too must not leave the stream recording
            with suppress(RuntimeError):  # says the same once more
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return outputs


def _copy(leaf: Tensor) -> Tensor:
    return leaf.detach().clone()


def _fill(buffers: Tree, values: Tree, rows: int) -> None:
    for buffer, value in zip(tree.leaves(buffers), tree.leaves(values), strict=True):
        buffer[:rows].copy_(value.detach())
