"""The contenders of a comparison: ways to minimise cost(z*(x), x) over x, all run for a given number of steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from jiio import tree
from jiio.joint import equilibrium
from jiio.nested import input_gradient, nested
from jiio.optimizer import LBFGS, Optimizer
from jiio.problem import Problem, State
from jiio.solution import Work
from jiio.solve import solve
from jiio.solver import Solver
from jiio.step import Step

# Tolerances of mu and x that no sample meets, so that every step of a comparison is done for all; that of z is the one
# that nested methods solve to, since z catches up to it at the end.
NEVER_CONVERGED = (1e-2, 1e-12, 1e-12)
SOLVE_STEPS = 60
Watch = Callable[[int, Tensor, Work | None], None]


class Method(Protocol):
    """What a comparison needs of a contender.

    in_rounds: a run of more steps is one of fewer and then some, its watch costs it nothing and is told the work so far.
    """

    @property
    def in_rounds(self) -> bool: ...

    def run(self, problem: Problem, start: State, steps: int, watch: Watch | None) -> Work:
        """`steps` steps of x; `watch(k, x, work)` sees x after k of them, solved for, k = 0, ..., `steps`."""
        ...


@dataclass(frozen=True)
class Joint:
    """The joint solve with an input step (None: automatic) and a solver (None: what goes with the step)."""

    step: Step | None
    solver: Solver | None = None

    in_rounds = False

    def run(self, problem: Problem, start: State, steps: int, watch: Watch | None) -> Work:
        """`steps` + 1 evaluations, the last of which measures."""
        return self.states(problem, start, steps, watch)[0]

    def states(self, problem: Problem, start: State, steps: int, watch: Watch | None) -> tuple[Work, State]:
        """The work, and the state that was reached."""
        callback = None if watch is None else (lambda k, s, now: watch(k, s.x, None))
        solution = solve(
            problem,
            start,
            step=self.step,
            solver=self.solver,
            max_steps=steps + 1,
            tol=NEVER_CONVERGED,
            on_failure="ignore",
            callback=callback,
        )
        return solution.work, solution.value


@dataclass(frozen=True)
class Nested:
    """Full solves to `solve_tol` before each step of an outer optimiser."""

    optimizer: Optimizer
    warm: bool
    solve_tol: float = 1e-2

    in_rounds = True

    def run(self, problem: Problem, start: State, steps: int, watch: Watch | None) -> Work:
        """`steps` + 1 rounds, the last of which measures."""
        callback = None if watch is None else (lambda k, s, work: watch(k, s.x, work))
        solution = nested(
            problem,
            start,
            optimizer=self.optimizer,
            rounds=steps + 1,
            warm=self.warm,
            solve_tol=self.solve_tol,
            callback=callback,
        )
        return solution.work


@dataclass(frozen=True)
class NestedSteps:
    """Warm full solves to `solve_tol` before each input step of the joint method's own: the same P of each sample at the
    same steps, and z taken along with x."""

    step: Step
    solve_tol: float = 1e-2

    in_rounds = True

    def run(self, problem: Problem, start: State, steps: int, watch: Watch | None) -> Work:
        """`steps` + 1 rounds, the last of which measures."""
        work, rule, (z, _, x), mu = Work(), self.step.rule, start, None
        settled = x.new_zeros(len(x))
        for k in range(steps + 1):
            z = equilibrium(problem, z, x, work=work, tol=self.solve_tol).value
            mu, gradient, _ = input_gradient(problem, z, mu, x, work=work, tol=self.solve_tol)
            if watch is not None:
                watch(k, x, work)
            with torch.no_grad():
                rule = rule.refresh(z, x, k, settled)
                change = problem.constraint.project(x - rule.rate * rule.direction(gradient)) - x
                z, x = self.step.carry(z, change), x + change
        return work


@dataclass(frozen=True)
class Handover:
    """`after` joint steps, then warm nested L-BFGS from where they ended."""

    joint: Joint
    optimizer: LBFGS
    after: int = 20
    solve_tol: float = 3e-2

    in_rounds = False

    def run(self, problem: Problem, start: State, steps: int, watch: Watch | None) -> Work:
        """Joint steps while `steps` allows no more, rounds of the nested method for the rest."""
        work, state = self.joint.states(problem, start, min(steps, self.after), watch)
        if steps <= self.after:
            return work
        shifted = None if watch is None else (lambda k, x, work: watch(k + self.after, x, None) if k else None)
        rest = Nested(self.optimizer, warm=True, solve_tol=self.solve_tol)
        work.include(rest.run(problem, state, steps - self.after, shifted))
        return work


@dataclass(frozen=True)
class TorchDEQ:
    """The nested loop that a user writes on TorchDEQ 0.1.0: its Anderson solver, its implicit gradient, an optimiser of x.

    Solves start cold, as its examples do.  ImportError where torchdeq is not installed.
    """

    optimizer: Optimizer
    solve_tol: float = 1e-2

    in_rounds = True

    def run(self, problem: Problem, start: State, steps: int, watch: Watch | None) -> Work:
        """`steps` + 1 rounds, counted by hooks on f."""
        torchdeq: Any = import_module("torchdeq")
        work, x = Work(), start.x.clone().requires_grad_()
        tolerance = {"f_tol": self.solve_tol, "b_tol": self.solve_tol, "f_stop_mode": "rel", "b_stop_mode": "rel"}
        budget = {"f_max_iter": SOLVE_STEPS, "b_max_iter": SOLVE_STEPS}
        deq = torchdeq.get_deq(ift=True, f_solver="anderson", b_solver="anderson", **tolerance, **budget)
        memory = self.optimizer.init(x.detach())
        for k in range(steps + 1):
            found, _ = deq(_counted(problem, x, start, work), list(tree.leaves(start.z)))
            cost = problem.cost(tree.build(start.z, list(found[-1])), x, *problem.context)
            (gradient,) = torch.autograd.grad(cost.sum(), x)
            work.add(cost_grad=len(x))
            if watch is not None:
                watch(k, x.detach(), work)
            with torch.no_grad():
                moved, memory = self.optimizer.step(memory, x.detach(), gradient, cost.detach())
                x = problem.constraint.project(moved).requires_grad_()
        return work


def _counted(problem: Problem, x: Tensor, start: State, work: Work) -> Callable[..., list[Tensor]]:
    def pulled(gradient: Tensor) -> None:
        work.add(vjp=len(x))

    def f(*z: Tensor) -> list[Tensor]:
        work.add(f=len(x))
        out = tree.leaves(problem.evaluate(tree.build(start.z, list(z)), x))
        if out[0].requires_grad:
            out[0].register_hook(pulled)
        return out

    return f
