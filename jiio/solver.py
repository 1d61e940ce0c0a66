"""Solvers propose the next iterate of a fixed-point map, nothing else; stopping lives in `fixed_point`, failure in `book`.

`init(s)` makes a memory (a tree, every leaf with the batch first, so that the loop can select rows of it);
`step(memory, k, s, fs)` takes the iterate s_k and F(s_k) and returns the next iterate and the memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from jiio import tree
from jiio.tree import Tree


class Solver(Protocol):
    """What the loop needs of a solver."""

    @property
    def plain_steps(self) -> float:
        """Steps before it begins to mix iterates, which needs a map that stays the same."""
        ...

    def init(self, s: Tree) -> Tree:
        """Memory for iterates of the form of `s`."""
        ...

    def step(self, memory: Tree, k: int, s: Tree, fs: Tree) -> tuple[Tree, Tree]:
        """The next iterate and the memory, from `fs` = F(`s`) at step `k` = 0, 1, ..."""
        ...


def is_solver(value: object) -> bool:
    """Whether `value` is an instance of a solver, not its class or its name."""
    return not isinstance(value, type) and hasattr(value, "init")


def require_count(name: str, value: int) -> None:
    """`ValueError` unless `value` is a whole number, at least 1."""
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} is a whole number and must be at least 1, got {value!r}")


@dataclass(frozen=True)
class Picard:
    """Plain iteration s <- s + damping (F(s) - s), damping in (0, 1].

    >>> Picard().step((), 0, torch.zeros(1, 1), torch.ones(1, 1))[0]
    tensor([[1.]])
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], got {self.damping}")

    @property
    def plain_steps(self) -> float:
        """It never mixes."""
        return math.inf

    def init(self, s: Tree) -> Tree:
        """No memory."""
        return ()

    def step(self, memory: Tree, k: int, s: Tree, fs: Tree) -> tuple[Tree, Tree]:
        """F(s), damped."""
        return tree.lerp(s, fs, self.damping), memory


FORGOTTEN = 1e200  # |F(s) - s|^2 of an iterate that is not to be mixed in


class AndersonMemory(NamedTuple):
    values: Tree  # F(s_i): each leaf (batch, history, ...), one slot in storage as F returns it
    residuals: Tree  # F(s_i) - s_i, likewise
    gram: Tensor  # (batch, history, history), inner products of residuals, in double precision


@dataclass(frozen=True)
class Anderson:
    """Anderson mixing of type II (Walker and Ni 2011) of each sample on its own.

    The next iterate is sum_i a_i F(s_i), where a minimises |sum_i a_i (F(s_i) - s_i)| with sum_i a_i = 1 over the last
    `history` iterates. The normalised Gram matrix gets a relative `ridge` above rounding (None: 1e-6 in float32, 1e-13 in
    float64). Leaves are not rescaled: a coarse scale of mu whose first residual is near 0 would then outweigh all others,
    which cost an adjoint solve from 0 five of its ten steps. Inner products over 256 coordinates of a leaf are a sixth
    cheaper a step, but miss a few slow coordinates among many: 500 steps without an end where all took 15.
    growth: a sample whose residual is more than so many times its last one forgets all iterates before. With 1 mixing holds
    from the first joint step on (docs/experiments.md); `inf`, to forget nothing, is right where only mixing keeps an
    iteration from running away.
    Memory: 2 history + 2 states.
    """

    history: int = 5
    ridge: float | None = None
    growth: float = math.inf

    plain_steps = 0.0

    def __post_init__(self) -> None:
        require_count("history", self.history)
        if not self.growth > 0:
            raise ValueError(f"growth must be positive, or math.inf to forget nothing; got {self.growth}")

    def init(self, s: Tree) -> Tree:
        """None before the first value of F, whose layout in storage the ring buffers take."""
        return ()

    def step(self, memory: Tree, k: int, s: Tree, fs: Tree) -> tuple[Tree, Tree]:
        """Write one slot of the ring, one row of the Gram matrix, and mix."""
        memory, used = self.remember(memory, k, s, fs)
        if used == 1:
            return fs, memory
        mixing = self.weights(memory, used)
        return tree.apply(lambda ring: tree.combine(ring, mixing), memory.values), memory

    def remember(self, memory: Tree, k: int, s: Tree, fs: Tree) -> tuple[AndersonMemory, int]:
        """The memory with the iterate of step `k` in slot k % history, and how many slots are in use."""
        memory = self._begin(fs) if k == 0 else memory
        slot, used = k % self.history, min(k + 1, self.history)
        row = torch.zeros_like(memory.gram[:, slot, :used])
        for a, b, values, residuals in zip(*map(tree.leaves, (s, fs, memory.values, memory.residuals)), strict=True):
            values[:, slot] = b
            torch.sub(b, a, out=residuals[:, slot])
            flat = tree.stack_rows(residuals)
            row += tree.times(flat[:, :used], flat[:, slot])
        memory.gram[:, slot, :used] = row
        memory.gram[:, :used, slot] = row
        if used > 1 and self.growth < math.inf:
            self._forget(memory.gram.diagonal(dim1=1, dim2=2), slot, (k - 1) % self.history)
        return memory, used

    def _forget(self, squares: Tensor, now: int, last: int) -> None:
        """Where the residual grew, make those before so large that none of them is mixed in; the ring writes over them."""
        size = squares[:, now].clone()
        grew = size > squares[:, last] * self.growth * self.growth
        squares.masked_fill_(grew[:, None], FORGOTTEN)
        squares[:, now] = size

    def _begin(self, fs: Tree) -> AndersonMemory:
        rings = [tree.apply(lambda leaf: tree.stack_like(leaf, self.history), fs) for _ in range(2)]
        gram = tree.leaves(fs)[0].new_zeros(tree.batch_size(fs), self.history, self.history, dtype=torch.float64)
        return AndersonMemory(rings[0], rings[1], gram)

    def weights(self, memory: AndersonMemory, used: int) -> Tensor:
        """a of the slots in use, (batch, used)."""
        gram, dtype = memory.gram[:, :used, :used], tree.leaves(memory.values)[0].dtype
        ridge = self.ridge if self.ridge is not None else (1e-13 if dtype == torch.float64 else 1e-6)
        inverse = gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(torch.float64).tiny ** 0.5).rsqrt()
        normal = gram * inverse[:, :, None] * inverse[:, None, :]
        normal.diagonal(dim1=1, dim2=2).add_(ridge)
        solved, _ = torch.linalg.solve_ex(normal, inverse[:, :, None])
        mixing = solved[:, :, 0] * inverse
        return (mixing / mixing.sum(1, keepdim=True)).to(dtype)


class _BroydenMemory(NamedTuple):
    s: Tensor  # (batch, n), the last iterate
    g: Tensor  # (batch, n), its residual F(s) - s
    u: Tensor  # (batch, history, n)
    v: Tensor  # (batch, history, n), inverse Jacobian of F(s) - s is -I + sum_i u_i v_i^T


@dataclass(frozen=True)
class Broyden:
    """Broyden's good method (1965) on F(s) - s, of each sample on its own, restarted after `history` updates.

    An update whose denominator is below `guard` times the norms in it is skipped for that sample. Memory: 2 history + 3
    states.
    """

    history: int = 20
    guard: float = 1e-6

    plain_steps = 0.0

    def __post_init__(self) -> None:
        require_count("history", self.history)

    def init(self, s: Tree) -> _BroydenMemory:
        """No updates yet."""
        flat = tree.flatten(s)
        factors = [flat.new_zeros(flat.shape[0], self.history, flat.shape[1]) for _ in range(2)]
        return _BroydenMemory(flat, torch.zeros_like(flat), factors[0], factors[1])

    def step(self, memory: _BroydenMemory, k: int, s: Tree, fs: Tree) -> tuple[Tree, _BroydenMemory]:
        """One rank-one update, then one quasi-Newton step."""
        flat = tree.flatten(s)
        g = tree.flatten(fs) - flat
        position = (k - 1) % self.history
        if k > 0:
            if position == 0:
                memory.u.zero_()
                memory.v.zero_()
            self._update(memory, position, flat - memory.s, g - memory.g)
        proposal = flat - _inverse(memory, g)
        return tree.unflatten(proposal, s), memory._replace(s=flat, g=g)

    def _update(self, memory: _BroydenMemory, position: int, ds: Tensor, dg: Tensor) -> None:
        moved = _inverse(memory, dg)
        v = -ds + torch.einsum("bh,bhn->bn", torch.einsum("bhn,bn->bh", memory.u, ds), memory.v)
        denominator = torch.linalg.vecdot(v, dg)
        usable = denominator.abs() > self.guard * torch.linalg.vector_norm(ds, dim=1) * torch.linalg.vector_norm(
            dg, dim=1
        )
        safe = torch.where(usable, denominator, torch.ones_like(denominator))
        memory.u[:, position] = torch.where(usable[:, None], (ds - moved) / safe[:, None], 0.0)
        memory.v[:, position] = torch.where(usable[:, None], v, 0.0)


def _inverse(memory: _BroydenMemory, g: Tensor) -> Tensor:
    return torch.einsum("bh,bhn->bn", torch.einsum("bhn,bn->bh", memory.v, g), memory.u) - g


@dataclass(frozen=True)
class Delayed:
    """Plain iteration for `after` steps, then `solver`.

    Far from a minimum Anderson mixing seeks any stationary point; near one it shortens the tail of slow samples. 128 MNIST
    test images: 125 evaluations of f a sample and 99.2 % converged in 300 plain steps, 91 and all with Anderson(6) after 40.
    """

    solver: Solver = Anderson(6)
    after: int = 40

    def __post_init__(self) -> None:
        if not is_solver(self.solver):
            raise ValueError(f"Delayed takes an instance such as Anderson(6), got {self.solver!r}")
        if not isinstance(self.after, Integral) or self.after < 0:
            raise ValueError(f"after is a whole number of steps, at least 0, got {self.after!r}")

    @property
    def plain_steps(self) -> float:
        """As many as were asked for."""
        return self.after

    def init(self, s: Tree) -> Tree:
        """None while the iteration is plain."""
        return ()

    def step(self, memory: Tree, k: int, s: Tree, fs: Tree) -> tuple[Tree, Tree]:
        """F(s), then what `solver` makes of it."""
        if k < self.after:
            return fs, memory
        memory = self.solver.init(s) if k == self.after else memory
        return self.solver.step(memory, k - self.after, s, fs)
