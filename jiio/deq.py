"""Inference alone, as a module: z = f(z, x) with an exact gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jiio.fixed_point import check_budget, check_options, check_start, iterate
from jiio.implicit import attached, report_unconverged
from jiio.joint import EquilibriumMap
from jiio.problem import Problem
from jiio.solution import OnFailure, Solution, Work, settle_failure
from jiio.solver import Anderson, Solver
from jiio.tree import Tree


def _no_cost(z: Tree, x: Tensor, *context: Any) -> Tensor:
    return x.new_zeros(len(x))


class DEQ(nn.Module):
    """z*(x) = f(z*, x) of each sample, differentiable in x, context and the parameters of f (implicit differentiation).

    The gradient is the same in `train()` and `eval()`; under `no_grad` the forward alone runs.

    >>> deq = DEQ(lambda z, x: 0.5 * torch.tanh(z) + x)
    >>> x = torch.ones(2, 1, requires_grad=True)
    >>> z = deq(x, torch.zeros(2, 1))
    >>> torch.autograd.grad(z.sum(), x)[0].shape
    torch.Size([2, 1])
    """

    def __init__(
        self,
        f: Callable[..., Tree],
        *,
        solver: Solver = Anderson(),
        max_steps: int = 100,
        tol: float = 1e-4,
        gradient_tol: float = 1e-4,
        on_failure: OnFailure = "warn",
    ):
        super().__init__()
        check_budget(max_steps, (tol, gradient_tol))
        check_options(solver, on_failure)
        self.f, self.solver, self.max_steps, self.tol = f, solver, max_steps, tol
        self.gradient_tol = gradient_tol
        self.on_failure: OnFailure = on_failure

    def solve(self, x: Tensor, z0: Tree, *context: Any) -> Solution[Any]:
        """The `Solution` at `x` from the guess `z0`; `implicit` differentiates it."""
        check_start((z0, x))
        problem = Problem(self.f, _no_cost, context=context)
        problem.check_context(len(x))
        F = EquilibriumMap(problem, x, Work())
        solution = iterate(F, z0, solver=self.solver, max_steps=self.max_steps, tol=(self.tol,), check_every=1)
        return settle_failure(solution, solution.residual.new_tensor([self.tol]), self.on_failure)

    def forward(self, x: Tensor, z0: Tree, *context: Any) -> Tree:
        """z*(x), of the form of `z0`."""
        solution = self.solve(x, z0, *context)
        if not torch.is_grad_enabled():
            return solution.value
        value = attached(solution, tol=self.gradient_tol, on_failure=self.on_failure)
        if value is None:
            return solution.value
        report_unconverged(solution, self.on_failure)
        return value
