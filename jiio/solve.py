"""`solve`: equilibrium, adjoint and input in one iteration."""

from __future__ import annotations

from torch import Tensor

from jiio import tree
from jiio.automatic import automatic
from jiio.fixed_point import Callback, check_budget, check_options, iterate
from jiio.input_memory import InputMemory
from jiio.joint import COMPARABLE, JointMap, cost_slope, equilibrium, without_slope
from jiio.problem import Problem, State
from jiio.solution import OnFailure, Solution, Work, settle_failure
from jiio.solver import Picard, Solver
from jiio.step import Step
from jiio.tree import Tree

Tolerance = float | tuple[float, float, float]
SMALL_EQUILIBRIUM = 1e-3


def solve(
    problem: Problem,
    start: State,
    *,
    step: Step | None = None,
    solver: Solver | None = None,
    max_steps: int = 300,
    tol: Tolerance = (1e-3, 1e-2, 1e-2),
    on_failure: OnFailure = "warn",
    callback: Callback | None = None,
    trace: bool = False,
    compiled: bool = False,
) -> Solution[State]:
    """Minimise cost over x and solve z = f(z, x) and its adjoint together (JIIO, arXiv 2111.13236, joint iteration).

    First z settles at the start's x by evaluations of f alone; then every step moves z, mu and x from one forward and one
    backward pass. No graph is built: afterwards take `problem.lagrangian(solution.value)` when the outer loss is the
    cost, `implicit(solution)` when it is another.

    step: rates and input rule; `None` estimates each sample's curvature at its start.
    solver: `None` is the plain iteration, `Picard()`; where `step` is None too and x, free or in a box, has more than 64
    coordinates, `Delayed(after=12)`, since plain steps do not arrive there. Mixed iterates depend on rounding, in float32
    by more than 1e-5 and within the tolerances, so that a sample's may depend on what else is in its batch.
    tol: relative residuals of (z, mu, x), or one number for all. Of x it is the distance that a full input step would
    move it, divided by the constraint's scale (1 for a free x: latent units; the radius of a ball). That step is P g: with a
    number for P, flat directions of an ill-conditioned problem hardly count, with a `newton_step` or matrix they do, as of
    where it was measured. Of a free x it is multiplied where steps shrink slowly (docs/method.md, "Relative residuals").
    on_failure: "warn" with a `ConvergenceWarning`, "raise" `NotConverged`, or "ignore".
    callback: sees (step, state, evaluation) of every step.
    compiled: every step but the first runs in graphs of torch.compile, without a break: the evaluation with its derivatives,
    the residuals and, of a free x or one in a box or a ball, the move. Ten seconds at the first batch of a size, and at its
    halves as samples finish; a step of a small model then takes half to four fifths of the time (docs/choosing.md). Needs a C++
    compiler.

    Raises `ValueError`, naming shapes or values, for input that can't be solved.

    >>> import torch
    >>> target = torch.tensor([[0.3], [0.6]])
    >>> problem = Problem(lambda z, x, y: 0.5 * torch.tanh(z) + x, lambda z, x, y: (z - y).square().sum(1), context=(target,))
    >>> solution = solve(problem, problem.start(torch.zeros(2, 1), torch.zeros(2, 1)), tol=1e-4)
    >>> bool(solution.converged.all()), bool((solution.value.z - target).abs().max() < 1e-3)
    (True, True)
    """
    tolerances = tol if isinstance(tol, tuple) else (tol, tol, tol)
    check_budget(max_steps, tolerances)
    usual: Solver = Picard()
    check_options(usual if solver is None else solver, on_failure)
    if len(tolerances) != 3:
        raise ValueError(f"tol is one number or three, for (z, mu, x); got {tol}")
    problem.check(start)
    if step is not None:
        if not isinstance(step, Step):
            raise ValueError(f"give the step as Step(rate) or None, got {step!r}")
        step.check(problem.constraint, start.z, start.x)
    work = Work()
    start = settle(problem, start, work=work, tol=max(tolerances[0], COMPARABLE) / 2)
    if bool((tree.norm(start.mu) > 0).any()):
        start = without_slope(start, cost_slope(problem, start, work=work))
    if step is None:
        step, usual = automatic(problem, start, work=work)
    solver = usual if solver is None else solver
    memory = InputMemory.fresh(step.rule, start.x)
    F = JointMap(problem, step, floor_of(start.z), work, tolerances[0], memory, solver.plain_steps, compiled)
    given_away = [start]
    del start  # of no more use after the first step, when `iterate` lets go of its start
    solution = iterate(
        F, given_away.pop(), solver=solver, max_steps=max_steps, tol=tolerances, callback=callback, trace=trace
    )
    return settle_failure(solution, solution.residual.new_tensor(tolerances), on_failure)


def settle(problem: Problem, start: State, *, work: Work, tol: float) -> State:
    """The start with x made feasible and z at its equilibrium to `tol`, so that its cost can be compared."""
    x = problem.constraint.project(start.x.detach()).detach()
    z = equilibrium(problem, tree.detach(start.z), x, work=work, tol=tol).value
    return State(z, tree.detach(start.mu), x)


def floor_of(z: Tree) -> Tensor:
    """What residuals of z are measured against at least, (batch,): a thousandth of the equilibrium at the start."""
    return SMALL_EQUILIBRIUM * tree.norm(z)
