"""The baseline: a full equilibrium and adjoint solve before every step of an outer optimiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jiio import tree
from jiio.autodiff import pull, variable
from jiio.constraint import Free
from jiio.fixed_point import OneBlock, check_budget, check_options, iterate
from jiio.input_memory import InputMemory
from jiio.joint import JointMap, cost_slope, equilibrium, size_of_slope, without_slope
from jiio.optimizer import LBFGS, PGD, Adam, Optimizer
from jiio.precondition import BOXES, Rule, Scalar, require_commuting
from jiio.problem import Problem, State
from jiio.solution import OnFailure, Solution, Status, Work, settle_failure
from jiio.solve import floor_of
from jiio.solver import Anderson, Solver, is_solver, require_count
from jiio.step import Step
from jiio.tree import Tree

RoundCallback = Callable[[int, State, Work], None]


@dataclass(frozen=True)
class _AdjointMap(OneBlock):
    """mu -> J_z^T mu + dcost/dz at a fixed (z, x), from one kept graph of f."""

    outputs: list[Tensor]
    z: list[Tensor]
    slope: Tree
    work: Work
    blocks: tuple[str, ...] = ("mu",)

    def advance(self, s: Tree, k: int) -> Tree:
        """One vector-Jacobian product."""
        pulled = pull(self.outputs, tree.leaves(s), self.z, retain=True)
        self.work.add(vjp=len(pulled[0]))
        return tree.apply(torch.add, tree.build(s, pulled), self.slope)

    def select(self, rows: Tensor) -> _AdjointMap:
        """Refused: the graph belongs to the whole batch."""
        raise TypeError("an adjoint map can't be restricted to some samples")


def input_gradient(
    problem: Problem, z: Tree, mu: Tree | None, x: Tensor, *, work: Work, tol: float, max_steps: int = 60,
    solver: Solver = Anderson(),
) -> tuple[Tree, Tensor, Tensor]:  # fmt: skip
    """(mu, dcost(z*(x), x)/dx, cost) at an equilibrium `z`: one cost gradient, one forward, an adjoint solve from `mu`,
    or from dcost/dz, which is one evaluation further than 0."""
    z, x = tree.apply(variable, z), variable(x)
    with torch.enable_grad():
        outputs = tree.leaves(problem.evaluate(z, x))
        cost = problem.cost(z, x, *problem.context)
    *slope, slope_x = pull([cost], [torch.ones_like(cost)], [*tree.leaves(z), x], retain=True)
    work.add(f=len(x), cost_grad=len(x))
    F = _AdjointMap(outputs, tree.leaves(z), tree.build(z, slope), work)
    mu = iterate(F, F.slope if mu is None else mu, solver=solver, max_steps=max_steps, tol=(tol,), check_every=1).value
    (pulled,) = pull(outputs, tree.leaves(mu), [x])
    work.add(vjp=len(x))
    return mu, pulled + slope_x, cost.detach()


def nested(
    problem: Problem,
    start: State,
    *,
    optimizer: Optimizer = Adam(),
    rounds: int = 100,
    warm: bool = False,
    solve_tol: float = 1e-2,
    solver: Solver = Anderson(),
    tol: float = 1e-2,
    on_failure: OnFailure = "ignore",
    callback: RoundCallback | None = None,
) -> Solution[State]:
    """Minimise cost(z*(x), x) by `rounds` steps of an outer optimiser, z and mu solved to `solve_tol` before each.

    optimizer: `LBFGS` for a free x, `Adam` for a free one or a box, `PGD` with a rule that commutes with the constraint.
    warm: start each solve at the last one's z and mu, instead of at the start's z and at dcost/dz. The returned x of a
    sample is the best one met. `callback(round, state, work)` sees each solved state. The residuals are those of `solve`,
    measured once at the end; a baseline that ran its rounds is usually BUDGET, so failure is not reported unless asked.
    """
    require_count("rounds", rounds)
    if not is_solver(optimizer):
        raise ValueError(f"optimizer is an instance such as Adam() or LBFGS(), got {optimizer!r}")
    check_budget(rounds, (solve_tol, tol))
    check_options(solver, on_failure)
    problem.check(start)
    _check_commuting(optimizer, problem, start)
    work = Work()
    slope = size_of_slope(cost_slope(problem, start, work=work))
    x, memory = problem.constraint.project(start.x.detach()).detach(), optimizer.init(start.x)
    state = best = start._replace(x=x)
    best_cost = start.x.new_full((len(x),), torch.inf)
    for k in range(rounds):
        z0, mu0 = (state.z, state.mu) if warm and k else (start.z, None)
        solved = equilibrium(problem, z0, x, work=work, tol=solve_tol, solver=solver)
        mu, gradient, cost = input_gradient(problem, solved.value, mu0, x, work=work, tol=solve_tol, solver=solver)
        state = State(solved.value, mu, x)
        better = cost < best_cost
        best, best_cost = tree.where(better, state, best), torch.where(better, cost, best_cost)
        if callback is not None:
            callback(k, state, work)
        x, memory = optimizer.step(memory, x, gradient, cost)
        x = problem.constraint.project(x).detach()
    memory = replace(InputMemory.fresh(_rule(optimizer), best.x), slope=slope)
    solution = _measured(problem, best, floor_of(start.z), work, memory, tol, rounds)
    return settle_failure(solution, solution.residual.new_full((3,), tol), on_failure)


def _check_commuting(optimizer: Optimizer, problem: Problem, start: State) -> None:
    """`ValueError` where the steps, projected, would stop at the wrong point, or do not fit the start."""
    if isinstance(optimizer, PGD):
        Step(optimizer.rule).check(problem.constraint, start.z, start.x)
    elif isinstance(optimizer, Adam):
        require_commuting(problem.constraint, BOXES, "Adam, a diagonal preconditioner,")
    elif isinstance(optimizer, LBFGS):
        require_commuting(problem.constraint, (Free,), "L-BFGS, a matrix preconditioner,")
        if optimizer.initial is not None:
            optimizer.initial.check(problem.constraint, start.x)


def _rule(optimizer: Optimizer) -> Rule:
    """The rule in whose units the residual of x is measured."""
    if isinstance(optimizer, PGD):
        return optimizer.rule
    if isinstance(optimizer, LBFGS) and optimizer.initial is not None:
        return optimizer.initial
    return Scalar(1.0)


def _measured(
    problem: Problem, state: State, floor: Tensor, work: Work, memory: InputMemory, tol: float, rounds: int
) -> Solution[State]:
    F = JointMap(problem, Step(memory.rule, lag=None), floor, Work(), tol, memory, cut_steps=0)
    now = F.evaluate(without_slope(state, cost_slope(problem, state, work=Work())), 0)
    converged = (now.residual <= tol).all(1)
    status = torch.where(converged, int(Status.CONVERGED), int(Status.BUDGET))
    finite = now.residual.isfinite().all(1) & ~now.merit.isnan()  # the merit is NaN where the cost is not finite
    status = torch.where(finite, status, int(Status.NON_FINITE))
    steps = torch.full_like(status, rounds)
    return Solution(state, now.residual, F.blocks, now.merit, status, steps, work, F)
