"""What a solve returns: the value, and per sample how far to trust it."""

from __future__ import annotations

import enum
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
OnFailure = Literal["warn", "raise", "ignore"]


class Status(enum.IntEnum):
    """Why a sample stopped. `Status(code).sentence` is what a user reads."""

    CONVERGED = 0
    STALLED = 1
    DIVERGED = 2
    NON_FINITE = 3
    BUDGET = 4

    @property
    def sentence(self) -> str:
        """The reason in words.

        >>> Status.BUDGET.sentence
        'the step budget ended before every residual fell below its tolerance'
        """
        return _SENTENCES[self]


_SENTENCES = {
    Status.CONVERGED: "every residual is below its tolerance",
    Status.STALLED: "neither the merit nor the residual improved by 0.1 % in 50 steps, or no better point than an earlier"
    " one was found",
    Status.DIVERGED: "the residual grew a thousandfold over its best, or left the float range",
    Status.NON_FINITE: "f or cost returned NaN or infinity",
    Status.BUDGET: "the step budget ended before every residual fell below its tolerance",
}

_REMEDIES = {
    "z": "z lags or f is no contraction in z: raise max_steps, use solver=Anderson(), or a cell that is well posed",
    "mu": "the adjoint lags, as z does where f is no contraction: raise max_steps, lower the input step so that x waits for "
    "mu, or use solver=Delayed()",
    "x": "the input still moves: raise max_steps; use solver=Delayed() or a lower rate where its steps overshoot, a measured "
    "step (jiio.newton_step) or a higher rate where they are short; where step=None, start again from solution.value, whose "
    "curvature is measured anew; a ReLU cell can have its "
    "minimum on a kink, where no fixed point exists",
    "s": "raise max_steps, damp the iteration with Picard(damping=...), or use solver=Anderson() or Broyden()",
}

_DIVERGING = (
    "f may be no contraction in z where x went (jiio.spectral_radius tells): use a cell that is well posed, or a Box that "
    "keeps x away; or steps of x are too long: lower the rate"
)


class ConvergenceWarning(UserWarning):
    """Some samples of a solve did not converge; the message says how many, which block, and what to try."""


class NotConverged(RuntimeError):
    """Raised by `on_failure="raise"`; `.solution` is what was reached."""

    def __init__(self, message: str, solution: Any):
        super().__init__(message)
        self.solution = solution


@dataclass
class Work:
    """Evaluations spent, each counted once for every sample it was done for.

    f: forwards of f. vjp: vector-Jacobian products of f (the forward not counted). cost_grad: gradients of cost.
    Their prices differ by model; measure them before comparing methods (docs/measuring.md).
    """

    f: int = 0
    vjp: int = 0
    cost_grad: int = 0

    def add(self, *, f: int = 0, vjp: int = 0, cost_grad: int = 0) -> None:
        """Count `f`, `vjp` and `cost_grad` more sample evaluations."""
        self.f += f
        self.vjp += vjp
        self.cost_grad += cost_grad

    def include(self, other: Work) -> None:
        """Count what `other` has counted."""
        self.add(f=other.f, vjp=other.vjp, cost_grad=other.cost_grad)

    def each(self, samples: int) -> dict[str, float]:
        """By kind, of one of so many samples."""
        return {name: count / samples for name, count in asdict(self).items()}


class TracePoint(NamedTuple):
    """One step of a trace: residual (batch, blocks) and merit (batch,), NaN for samples already taken out."""

    step: int
    residual: Tensor
    merit: Tensor


@dataclass(frozen=True)
class Solution(Generic[T]):
    """The result of a solve; every per-sample tensor has shape (batch,) or (batch, blocks).

    value:    the returned iterate, detached.
    residual: relative residual of each block, measured on `value` itself.
    blocks:   the names of the columns of `residual`.
    merit:    what iterates were compared by: of a joint solve its Lagrangian, which is the cost at the equilibrium of x to
              second order in z's error (infinite where z is far from it), the relative residual of a plain fixed point.
    status:   `Status` codes.  steps: evaluations of the map that each sample took part in.
    work:     sample evaluations by kind.  trace: one point a step when asked for, else empty.
    map:      the map that was iterated, which `implicit` differentiates.
    """

    value: T
    residual: Tensor
    blocks: tuple[str, ...]
    merit: Tensor
    status: Tensor
    steps: Tensor
    work: Work
    map: Any = field(repr=False)
    trace: tuple[TracePoint, ...] = field(default=(), repr=False)

    @property
    def converged(self) -> Tensor:
        """Whether each sample converged, shape (batch,)."""
        return self.status == Status.CONVERGED

    @property
    def cost(self) -> Tensor:
        """The merit; for a joint solve the cost at the equilibrium of the returned x, shape (batch,)."""
        return self.merit

    def report(self) -> str:
        """A few lines for a person: outcomes by reason, median and worst residual of each block, work."""
        batch = self.status.numel()
        lines = [f"{int(self.converged.sum())} of {batch} samples converged"]
        for status in Status:
            count = int((self.status == status).sum())
            if count and status is not Status.CONVERGED:
                lines.append(f"  {count} {status.name}: {status.sentence}")
        for name, column in zip(self.blocks, self.residual.T, strict=True):
            lines.append(f"  residual {name}: median {column.nanmedian():.1e}, worst {column.max():.1e}")
        work = self.work
        lines.append(
            f"  work a sample: {work.f / batch:.1f} f, {work.vjp / batch:.1f} VJPs, {work.cost_grad / batch:.1f} cost gradients"
        )
        return "\n".join(lines)


def settle_failure(solution: Solution[T], tol: Tensor, on_failure: OnFailure) -> Solution[T]:
    """Warn, raise or say nothing about samples that did not converge; returns `solution`."""
    if on_failure == "ignore" or bool(solution.converged.all()):
        return solution
    message = failure_message(solution, tol)
    if on_failure == "raise":
        raise NotConverged(message, solution)
    warnings.warn(message, ConvergenceWarning, stacklevel=3)
    return solution


def failure_message(solution: Solution[Any], tol: Tensor) -> str:
    """Count and reasons, the worst block with its residual, and what to try."""
    failed = ~solution.converged
    excess = (solution.residual[failed] / tol).nan_to_num(nan=torch.inf)
    worst = int(excess.amax(0).argmax())
    name = solution.blocks[worst]
    remedy = _REMEDIES[name]
    # of an iterate that ran away the largest block is as large as it is by chance
    if "mu" in solution.blocks and bool((solution.status[failed] == Status.DIVERGED).all()):
        remedy = _DIVERGING
    reasons = ", ".join(
        f"{int((solution.status == status).sum())} {status.name}"
        for status in Status
        if status is not Status.CONVERGED and bool((solution.status == status).any())
    )
    value = solution.residual[failed][:, worst].max()
    return (
        f"{int(failed.sum())} of {failed.numel()} samples did not converge ({reasons}); worst block {name}: relative "
        f"residual {value:.1e}, tolerance {float(tol[worst]):.1e}. Try: {remedy}."
    )
