"""Derivatives through a solution: one linear solve with the Jacobian of the system that the solve made vanish."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from jiio import tree
from jiio.autodiff import pull, variable
from jiio.fixed_point import check_answer
from jiio.krylov import RESTART, LinearSolution, gmres, minres
from jiio.solution import ConvergenceWarning, NotConverged, OnFailure, Solution, Status

T = TypeVar("T")


def implicit(
    solution: Solution[T],
    *,
    tol: float = 1e-6,
    max_steps: int = 300,
    restart: int = RESTART,
    on_failure: OnFailure = "warn",
    callback: Callable[[LinearSolution], None] | None = None,
) -> T:
    """`solution.value` as a function of every tensor that f, cost and context were built from, for `backward`.

    The solution makes a system R(s, theta) vanish, so ds = -(dR/ds)^-1 dR/dtheta (implicit function theorem): the
    backward pass solves one linear system in (dR/ds)^T. For a free x R is the gradient of the Lagrangian and its Jacobian
    the symmetric, indefinite Hessian: MINRES. For a constrained x, and for an equilibrium alone: GMRES.

    tol, max_steps: of the linear solve, relative residual and products. restart: products after which GMRES starts over.
    Until then it keeps one vector of the size of (z, mu, x) for each, so a smaller one bounds memory; but an
    ill-conditioned system then stands still, whatever `max_steps`. `callback` receives its result (with a status per
    sample); samples that miss `tol` are reported according to `on_failure`. A solution that has itself not converged is
    reported here too: its derivative is that of a point that is not a solution (unfinished, or on a kink of a ReLU cell).

    The result can be differentiated once; a second derivative raises `RuntimeError`. Raises `ValueError` when nothing
    that the solution depends on requires a gradient (a cell bound under `no_grad`, say).
    """
    check_answer(on_failure)
    if not torch.is_grad_enabled():
        return solution.value
    report_unconverged(solution, on_failure)
    value = attached(solution, tol=tol, max_steps=max_steps, restart=restart, on_failure=on_failure, callback=callback)
    if value is None:
        raise ValueError(
            "nothing to differentiate: the solution depends on no tensor that requires a gradient. Was the cell bound "
            "under torch.no_grad(), or its context detached?"
        )
    return value


def attached(
    solution: Solution[T],
    *,
    tol: float,
    max_steps: int = 300,
    restart: int = RESTART,
    on_failure: OnFailure = "warn",
    callback: Callable[[LinearSolution], None] | None = None,
) -> T | None:
    """The value of `implicit`, or None when nothing that the solution was built from requires a gradient."""
    state = [variable(leaf) for leaf in tree.leaves(solution.value)]
    residual = tree.leaves(solution.map.residual(tree.build(solution.value, state)))
    if not _depends_on_more_than(state, residual):
        return None
    options = _Options(solution.map, state, tol, max_steps, restart, on_failure, callback)
    values = [leaf.detach() for leaf in state]
    return tree.build(solution.value, list(_Attach.apply(options, *values, *residual)))  # pyright: ignore


@dataclass(frozen=True)
class _Options:
    map: Any
    state: list[Tensor]
    tol: float
    max_steps: int
    restart: int
    on_failure: OnFailure
    callback: Callable[[LinearSolution], None] | None


class _Attach(torch.autograd.Function):
    """Returns the state; its backward hands -(dR/ds)^-T v to the residual."""

    @staticmethod
    def forward(ctx: Any, options: _Options, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(options.state)
        ctx.options = options
        ctx.save_for_backward(*tensors[count:])
        return tuple(leaf.clone() for leaf in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        residual = ctx.saved_tensors
        with torch.enable_grad():  # under create_graph=True the saved tensors still carry their history
            solved = _transposed_solve(ctx.options, residual, gradients)
        if torch.is_grad_enabled():
            solved = _Refuse.apply(len(solved), *solved, *residual)
        return None, *[None] * len(gradients), *solved  # pyright: ignore


class _Refuse(torch.autograd.Function):
    """Identity that lies on every path of a second derivative and refuses it: s* and the solve would be held constant."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaf.clone() for leaf in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the second derivative through an implicit solution is not implemented (it would be silently wrong): "
            "differentiate an unrolled solve, or use finite differences of the first derivative"
        )


def _transposed_solve(options: _Options, residual: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """-(dR/ds)^-T v, leaf by leaf."""
    form = tuple(options.state)

    def product(w: Tensor) -> Tensor:
        seeds = tree.leaves(tree.unflatten(w, form))
        return tree.flatten(tuple(pull(residual, seeds, options.state, retain=True)))

    v = tree.flatten(tuple(gradients))
    if options.map.symmetric:
        solved = minres(product, v, tol=options.tol, max_steps=options.max_steps)
    else:
        solved = gmres(product, v, tol=options.tol, max_steps=options.max_steps, restart=options.restart)
    if options.callback is not None:
        options.callback(solved)
    _report_adjoint(solved, options)
    return [-leaf for leaf in tree.leaves(tree.unflatten(solved.value, form))]


def _report_adjoint(solved: LinearSolution, options: _Options) -> None:
    failed = int((~solved.converged).sum())
    if not failed or options.on_failure == "ignore":
        return
    restarts = not options.map.symmetric and solved.steps > options.restart and options.restart < solved.value.shape[1]
    first = f"a restart above {options.restart} (each one starts GMRES over), " if restarts else ""
    message = (
        f"the adjoint solve of {failed} of {len(solved.converged)} samples stopped at a relative residual of up to "
        f"{float(solved.residual.max()):.1e}, tolerance {options.tol:.1e}. Try: {first}a larger "
        "max_steps or tol of implicit(...)."
    )
    if options.on_failure == "raise":
        raise NotConverged(message, solved)
    warnings.warn(message, ConvergenceWarning, stacklevel=2)


def _depends_on_more_than(state: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Whether the graph of `outputs` ends in any leaf outside `state`."""
    inside = {id(leaf) for leaf in state}
    seen: set[Any] = set()
    nodes: list[Any] = [out.grad_fn for out in outputs]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in inside:
            return True
        nodes.extend(next_node for next_node, _ in node.next_functions)
    return False


def report_unconverged(solution: Solution[Any], on_failure: OnFailure) -> None:
    """Say that the derivative of samples that have not converged is not that of a solution."""
    failed = int((~solution.converged).sum())
    if not failed or on_failure == "ignore":
        return
    message = (
        f"{failed} of {solution.status.numel()} samples have not converged: their implicit derivative is not that of a "
        "solution. Solve them further, or leave them out of the loss with solution.converged."
    )
    broken = solution.status == Status.NON_FINITE
    if bool(broken.any()):  # 0 times NaN is NaN
        message += (
            f" Solve again without samples {broken.nonzero()[:8, 0].tolist()}: what is not finite makes gradients of weights "
            "NaN even where it is left out of the loss."
        )
    if on_failure == "raise":
        raise NotConverged(message, solution)
    warnings.warn(message, ConvergenceWarning, stacklevel=3)
