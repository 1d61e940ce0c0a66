"""The maps that are iterated: f itself (EquilibriumMap) and the joint step on (z, mu, x) (JointMap)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from jiio import tree
from jiio.autodiff import pull, variable
from jiio.book import Evaluation
from jiio.constraint import Box, Free, L2Ball, LinfBall
from jiio.fixed_point import CHECK_EVERY, OneBlock, called, iterate, part_of, relative, require_same_form
from jiio.graph import run_as
from jiio.input_memory import InputMemory, steps_left
from jiio.precondition import Normalized, Scalar, Sign
from jiio.problem import Problem, State, Sweep
from jiio.solution import Solution, Work
from jiio.solver import Anderson, Delayed, Solver
from jiio.step import Step
from jiio.tree import Tree, wide

# An iterate's cost is compared with another's only where z is an equilibrium to the tolerance asked for, but never to
# less than this: a lagging z can make a cost look better than it is.
COMPARABLE = 1e-4
# The Lagrangian differs from the cost at the equilibrium by the product of the errors of z and mu, which are their residuals
# over 1 - contraction; without this margin every fourth adaptation of a perfect fit was handed back unconverged.
DOUBT = 3.0
# Of the way that steps of x which shrink slowly would still go, the share that counts: of those that become shorter by a fifth
# or more it is less than a step.
SLOW = 0.2
TRACED = (Free, Box, L2Ball, LinfBall)  # sets whose projection is a graph of tensors
PLAIN_STEPS = 60  # evaluations of f in which z catches up with x at the end of a solve


@dataclass(frozen=True)
class EquilibriumMap(OneBlock):
    """z -> f(z, x) at a fixed x."""

    problem: Problem
    x: Tensor
    work: Work
    blocks: tuple[str, ...] = ("z",)
    symmetric: bool = False

    def kept(self, unfinished: int, rows: int) -> int:
        """Rows can be taken out when the per-sample data are the problem's context."""
        return unfinished if self.problem.context else rows

    def advance(self, s: Tree, k: int) -> Tree:
        """f(z, x)."""
        with torch.no_grad():
            fz = called("f", lambda z: self.problem.evaluate(z, self.x), s)
        if k == 0:
            require_same_form("f", s, fz)
        self.work.add(f=len(self.x))
        return fz

    def residual(self, s: Tree) -> Tree:
        """f(z, x) - z, with graph."""
        return tree.apply(torch.sub, self.problem.evaluate(s, self.x), s)

    def select(self, rows: Tensor) -> EquilibriumMap:
        """The map of the samples `rows`."""
        return replace(self, problem=self.problem.select(rows), x=self.x[rows])


def equilibrium(
    problem: Problem,
    z: Tree,
    x: Tensor,
    *,
    work: Work,
    tol: float,
    max_steps: int = 60,
    solver: Solver = Anderson(),
) -> Solution[Tree]:
    """z = f(z, x) at fixed x from the guess `z`, to relative residual `tol`, best effort."""
    F = EquilibriumMap(problem, x.detach(), work)
    return iterate(F, z, solver=solver, max_steps=max_steps, tol=(tol,), check_every=1)


def cost_slope(problem: Problem, state: State, *, work: Work) -> Tree:
    """dcost/dz, of the form of z, without graph."""
    work.add(cost_grad=len(state.x))
    z = tree.apply(variable, state.z)
    with torch.enable_grad():
        cost = problem.cost(z, state.x.detach(), *problem.context)
    problem.check_cost(cost, len(state.x))
    return tree.build(z, pull([cost], [torch.ones_like(cost)], tree.leaves(z)))


def size_of_slope(slope: Tree) -> Tensor:
    """|dcost/dz| of each sample, (batch,), to divide by."""
    size = tree.norm(slope)
    return size.clamp_min(torch.finfo(size.dtype).tiny)


def without_slope(state: State, slope: Tree) -> State:
    """A state with the multiplier of `Problem.lagrangian` as `JointMap` takes it: mu - dcost/dz. A multiplier of 0 is none yet
    and stays 0, for dcost/dz, where one begins, is in the step itself; so does one whose slope is not finite."""
    unset = (tree.norm(state.mu) == 0) | ~tree.finite(slope)
    return state._replace(mu=tree.where(unset, state.mu, tree.apply(torch.sub, state.mu, slope)))


class _Residuals(NamedTuple):
    """Relative residuals (batch,) of z and mu, what they were divided by, and the Lagrangian."""

    z: Tensor
    size_z: Tensor
    mu: Tensor
    size_mu: Tensor
    lagrangian: Tensor


def _residuals(s: State, now: Sweep, floor: Tensor, slope: Tensor) -> _Residuals:
    defect = tree.apply(torch.sub, now.f, s.z)
    r_z, size_z = relative(defect, now.f, floor)
    size_mu = torch.maximum(tree.norm(now.adjoint), slope)
    r_mu = part_of(size_mu, tree.norm(tree.apply(torch.sub, now.mu, s.mu)))
    # the Lagrangian is the cost at the equilibrium to second order in how far z is off, the cost only to first: compared
    # by cost, every fourth attack ended at an earlier image, unconverged, that a lagging z had flattered
    lagrangian = now.cost + tree.inner(s.mu, defect).masked_fill(~(r_mu < 1), 0.0)
    return _Residuals(r_z, size_z, r_mu, size_mu, lagrangian)


@dataclass(frozen=True)
class JointMap:
    """One step of (z, mu, x) from one evaluation of f, one vector-Jacobian product and one cost gradient (`Problem.sweep`):

        z  <- z  + r_z  (f(z, x) - z)
        mu <- mu + r_mu (J_z^T a - mu)
        x  <- project(x - rate P (J_x^T a + dcost/dx)),      a = mu + dcost/dz

    with the slopes of the cost at f(z, x). So mu is what the adjoint a is beyond dcost/dz; the states that are returned have
    a in its place, the multiplier of the Lagrangian. A step that knows the tangent dz*/dx uses it twice: z is taken along
    with x (`Step.carry`), and the gradient in x is what it will be when mu has settled (`Step.reduced`).

    floor: sizes (batch,) below which z does not shrink its relative residual: that of an equilibrium at 0 would stay what it
    is while z falls. That of mu is measured against the slope of the cost at the start, where that is larger.
    memory: of the input steps, the one thing that changes in the course of a solve.
    cut_steps: how long overshooting is answered by shorter steps; a solver that mixes iterates needs a map that stays.
    compiled: the sweep, the residuals and, in a set of `TRACED`, the move of (z, mu, x) are each one graph of torch.compile;
    the sweep of a `Problem` itself, for a subclass has a way of its own.
    """

    problem: Problem
    step: Step
    floor: Tensor
    work: Work
    tol_z: float
    memory: InputMemory
    cut_steps: float
    compiled: bool = False
    blocks: tuple[str, ...] = ("z", "mu", "x")

    def kept(self, unfinished: int, rows: int) -> int:
        """Rows can be taken out when the per-sample data are the problem's context; of a graph, which has one size, half."""
        if not self.problem.context:
            return rows
        if not self.compiled:
            return unfinished
        while rows > 1 and unfinished <= (rows + 1) // 2:
            rows = (rows + 1) // 2
        return rows

    def advance(self, s: State, k: int) -> State:
        """The step; x waits as long as it did at the last measurement."""
        return self._moved(s, self._swept(s, k), k)[0]

    def evaluate(self, s: State, k: int) -> Evaluation:
        """The step, and the relative residuals: z by |f|, mu by |a| or the first slope, x by rate and scale."""
        now = self._swept(s, k)
        if self.memory.slope is None:
            self.memory.slope = size_of_slope(tree.apply(torch.sub, now.adjoint, s.mu))
        seen = run_as(_residuals, self.compiled and k > 0)(s, now, self.floor, self.memory.slope)
        # measured for a trace or not, a solve takes the same steps
        if self.memory.lag is None or k % CHECK_EVERY == 0:
            self.memory.lag = torch.maximum(seen.z, seen.mu)
        before = self.memory.change
        state, rate, change = self._moved(s, now, k)
        distance = torch.linalg.vector_norm(change.flatten(1), dim=1)
        # a normalised step's rate is a length in the units of x already
        scale = 1.0 if isinstance(self.memory.rule, Normalized | Sign) else self.problem.constraint.scale
        r_x = distance / (rate * scale).clamp_min(torch.finfo(distance.dtype).tiny)
        remaining = torch.ones_like(distance)
        if self.symmetric and k < self.cut_steps:
            remaining = (SLOW * rate * steps_left(change, before)).clamp_min(1.0)
        merit = seen.lagrangian.masked_fill(~(seen.z < max(self.tol_z, COMPARABLE)), torch.inf)
        merit = merit.masked_fill(~now.cost.isfinite(), torch.nan)
        doubt = DOUBT * (seen.z * seen.size_z) * (seen.mu * seen.size_mu)
        value, residual = s._replace(mu=now.adjoint), torch.stack((seen.z, seen.mu, r_x), dim=1)
        return Evaluation(state, value, residual, remaining, seen.size_z, merit, doubt)

    def _swept(self, s: State, k: int) -> Sweep:
        self.work.add(f=len(s.x), vjp=len(s.x), cost_grad=len(s.x))
        # the first as usual, so that an f or a cost that does not fit is refused by our sentences; a problem of another kind
        # has a way of its own to be quick
        if not (self.compiled and k > 0 and type(self.problem) is Problem):
            return self._sweep(s)
        F, context = self, self.problem.context
        if any(leaf.requires_grad for part in context for leaf in tree.leaves(part)):
            # a graph takes no tensor with a history, which is for `residual` alone
            F = replace(self, problem=replace(self.problem, context=tuple(map(tree.detach, context))))
        return run_as(JointMap._sweep, compiled=True)(F, s)

    def _moved(self, s: State, now: Sweep, k: int) -> tuple[State, Tensor, Tensor]:
        """The step, each sample's input rate, and x less where the step at that rate ends."""
        assert self.memory.lag is not None, "the first step of a solve is measured"
        self.memory.rule = self.memory.rule.refresh(s.z, s.x, k, self.memory.lag)
        rate = self.step.rate(k, self.memory.lag)
        # a tensor, for a number would be part of the graph
        ahead = torch.tensor(self.step.ahead(k), dtype=s.x.dtype) if self.step.lookahead else None
        move = run_as(JointMap._move, self.compiled and k > 0 and type(self.problem.constraint) in TRACED)
        return move(self, s, now, rate, ahead, k < self.cut_steps)

    def _sweep(self, s: State) -> Sweep:
        now = self.problem.sweep(s)
        return now._replace(x=self.step.reduced(now.x, s.mu, now.mu))

    def _move(
        self, s: State, now: Sweep, rate: Tensor, ahead: Tensor | None, cuts: bool
    ) -> tuple[State, Tensor, Tensor]:
        memory, cut = self.memory, self.step.cut if cuts else None
        direction = memory.rule.direction(now.x)
        if ahead is not None:
            direction = memory.ahead(direction, ahead)
        if cut is not None:
            rate = rate * memory.factor
        with torch.no_grad():  # else sets whose tensors require grad would chain all steps of a solve into one graph
            change = self.problem.constraint.moved(s.x, wide(rate, s.x) * direction)
        memory.change, taken = change, change
        if cut is not None:
            # on an active constraint the gradient keeps a normal part that hides how its tangential part turns
            probe = now.x if self.symmetric else change
            share = memory.look(probe, change / wide(rate, change), cut)
            taken = wide(share, change) * change  # part of the way to a feasible point is feasible
        z = self.step.carry(tree.lerp(s.z, now.f, self.step.z), -taken)
        return State(z, tree.lerp(s.mu, now.mu, self.step.mu), s.x - taken), rate, change

    @property
    def symmetric(self) -> bool:
        """Whether `residual` is a gradient, so that its Jacobian is symmetric."""
        return isinstance(self.problem.constraint, Free)

    def residual(self, s: State) -> State:
        """The stationarity system at `s`, its mu the Lagrangian's multiplier, with graph: (dL/dz, dL/dmu, dL/dx) for a free
        x; for a constrained one the last row is project(x - P dL/dx) - x, which vanishes at the same points."""
        now = self.problem.gradients(s, graph=True)
        row_z = tree.apply(torch.sub, now.z, s.mu)
        row_mu = tree.apply(torch.sub, now.f, s.z)
        if self.symmetric:
            return State(row_z, row_mu, now.x)
        return State(row_z, row_mu, self.problem.constraint.project(s.x - self._metric(now.x)) - s.x)

    def _metric(self, gradient: Tensor) -> Tensor:
        """A linear P g: a normalised step is replaced by the scalar step of the same length."""
        rule = self.memory.rule
        if isinstance(rule, Normalized | Sign):
            size = torch.linalg.vector_norm(gradient.detach().flatten(1), dim=1)
            rule = Scalar(1.0, scale=rule.rate / size.clamp_min(torch.finfo(size.dtype).tiny))
        return rule.direction(gradient)

    def project(self, s: State) -> State:
        """The state with x projected onto the constraint."""
        if self.symmetric:
            return s
        with torch.no_grad():
            return s._replace(x=self.problem.constraint.project(s.x))

    def settled(self, s: State) -> State:
        """z caught up with x, by evaluations of f alone, so that the cost can be compared."""
        # with no more history than leaves a solve its peak of memory: beside s and F(s) a longer one would set it; mixing two
        # iterates costs a small model what f does, and z is mostly there after three. A solve that never mixes mixes here too
        # where plain evaluations do not arrive, at a contraction of 0.98: what it has reached would be lost
        plain, steps = (PLAIN_STEPS, 2 * PLAIN_STEPS) if math.isinf(self.cut_steps) else (3, PLAIN_STEPS)
        tol = 0.9 * max(self.tol_z, COMPARABLE)  # less, for it is measured again, and may round up
        solver = Delayed(Anderson(2), after=plain)
        found = equilibrium(self.problem, s.z, s.x, work=self.work, tol=tol, max_steps=steps, solver=solver)
        return s._replace(z=found.value)

    def measure(self, s: State) -> Evaluation:
        """An evaluation without a say in the solve's own memory, of an x whose last step may be in it already."""
        return replace(self, memory=replace(self.memory, change=None)).evaluate(s, 0)

    def select(self, rows: Tensor) -> JointMap:
        """The map of the samples `rows`."""
        return replace(
            self,
            problem=self.problem.select(rows),
            step=self.step.select(rows),
            floor=self.floor[rows],
            memory=self.memory.select(rows),
        )
