"""Input steps that are measured: on each sample at its start, or once for a model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from jiio import tree
from jiio.constraint import Box, Free, L2Ball, LinfBall
from jiio.curvature import RANK_FLOOR, curvature_and_slope, leading, response
from jiio.damped import Damped
from jiio.fixed_point import relative
from jiio.joint import equilibrium
from jiio.low_rank import LowRank
from jiio.precondition import Matrix, Rule, Scalar, require_commuting
from jiio.problem import Problem, State
from jiio.solution import Work
from jiio.solver import Delayed, Picard, Solver
from jiio.step import Step
from jiio.tree import Tree

# Up to this many coordinates of x the automatic step forms each sample's own Gauss-Newton matrix.
SMALL_INPUT = 64
RANK = 4  # curvatures of a larger one: as dear as the largest alone by power iteration
# Of the curvature that stands for all others, in parts of the largest: a small prior's alone was thousands of times too flat
# for directions that are steep elsewhere (docs/experiments.md, "A large x").
OTHERS_FLOOR = 0.03
RATE = 1.0
PART = 0.5  # of such a step
MODEL_TOL = 1e-3  # of z where a model is measured
# Of the tangents of a solve's own samples: to 0.01 they cost two to three times as much and save no step (docs/experiments.md).
ROUGH = 0.1
# z hardly falls behind an x that takes it along: x waits only where z or mu are no solution at all
MEASURED_LAG = 1.0
# In units of the inverse of the largest curvature a step hardly moves along flat directions: 16 problems with 256 latents
# were called converged at thirty times the best cost.
FLATNESS = 10.0
MIXING = Delayed(after=12)
FLOOR = 1e-3  # of curvatures, in parts of the largest
DAMPINGS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # in parts of the largest curvature
MOST_MISSED = 0.1  # relative residual of z after a first step, up to which its tangent is believed
FARTHEST = 10.0  # sizes of z that an undamped Newton step may move it by


def automatic(problem: Problem, start: State, *, work: Work) -> tuple[Step, Solver]:
    """The input step that `solve` takes when none is given, from each sample's curvature at its start, z solved for, and the
    solver that goes with it.

    A free x of up to 64 coordinates: the inverse of the sample's own Gauss-Newton matrix, damped as far as needed
    (`damped_inverse`), at whole Newton steps, and its tangent, in memory an equilibrium for each coordinate.
    A larger one: half a step of the inverse of its `RANK` largest curvatures, the least of which that is not 0, or
    `OTHERS_FLOOR` of the largest, stands for all others, and iterates that are mixed.
    Otherwise plain steps of half the inverse of the largest curvature, mixed where nothing but a box holds a larger x along
    flat directions. A P of few curvatures is made so large, and its rate so small, that the residual of x tells of
    directions that are ten times as flat as the steepest.
    """
    z, x = start.z, start.x
    free = isinstance(problem.constraint, Free)
    if free and x[0].numel() <= SMALL_INPUT:
        tangent, matrix = response(problem, z, x, tol=ROUGH, work=work)
        rule = damped_inverse(problem, start, tangent, matrix, metric_of(tangent), rate=RATE, work=work)
        return Step(rule, lag=MEASURED_LAG, tangent=tangent), Picard()
    if free:
        return Step(_low_rank(problem, z, x, work=work), lag=MEASURED_LAG), MIXING
    largest, slope = curvature_and_slope(problem, z, x, tol=ROUGH, work=work)
    largest = torch.maximum(largest, _least_curvature(problem, x, slope))
    if x[0].numel() > SMALL_INPUT and isinstance(problem.constraint, Box):
        return Step(Scalar(PART / FLATNESS, scale=FLATNESS / largest)), MIXING
    return Step(Scalar(PART, scale=1 / largest)), Picard()


def _low_rank(problem: Problem, z: Tree, x: Tensor, *, work: Work) -> LowRank:
    """The rule of `automatic` for a large free x."""
    values, vectors, slope = leading(problem, z, x, RANK, tol=ROUGH, work=work)
    # where fewer were seen, as of a cost of two numbers, other directions have no curvature at this x only
    seen = torch.where(values > RANK_FLOOR * values[:, :1], values, values[:, :1])
    rest = torch.maximum(seen.amin(1, keepdim=True), OTHERS_FLOOR * values[:, :1])
    rest = torch.maximum(rest, _least_curvature(problem, x, slope)[:, None])
    values = torch.maximum(values, rest)
    larger = (FLATNESS * rest / values[:, :1]).clamp_min(1.0)
    return LowRank(vectors, values / larger, rest / larger, PART / larger[:, 0])


def newton_step(problem: Problem, start: State, *, rate: float = RATE) -> Step:
    """One step for all problems of a model, measured on the few that `problem` holds, at the x of `start`: the
    inverse of their mean Gauss-Newton matrix, damped as far as a first step from their mean x needs it (`damped_inverse`), and
    their mean tangent, by which z moves along with x.

    It costs what `solve(step=None)` spends on its own batch; keep the step. Best measured where solutions lie: solve a few
    problems first and give `solution.value` as `start`. x must be free.

    >>> problem = Problem(lambda z, x: 0.9 * z + x, lambda z, x: (z - 1).square().sum(1))
    >>> step = newton_step(problem, problem.start(torch.zeros(1, 2), torch.zeros(1, 2)))
    >>> [tuple(leaf.shape) for leaf in tree.leaves(step.tangent)]
    [(1, 2, 2)]
    """
    problem.check(start)
    require_commuting(problem.constraint, (Free,), "a newton_step")
    z = _settled(problem, start.z, start.x)
    tangent, matrix = response(problem, z, start.x)
    now = problem.sweep(problem.start(start.x, z))
    wrong = ~tree.finite((tangent, matrix, now.f, now.x))
    if bool(wrong.any()):  # the mean would be NaN, and with it every sample of every later solve
        rows = wrong.nonzero()[:8, 0].tolist()
        raise ValueError(
            f"f, cost or their derivatives are not finite for samples {rows}: measure the step without them"
        )
    mean = tree.apply(_mean, tangent)
    x = start.x.mean(0).expand_as(start.x)
    z = _settled(problem, start.z, x)
    trial = problem.start(x, z)
    means = matrix.mean(0, keepdim=True), metric_of(tangent).mean(0, keepdim=True)
    rule = damped_inverse(problem, trial, mean, *means, rate=rate, work=Work())
    return Step(rule, lag=MEASURED_LAG, tangent=mean)


def _settled(problem: Problem, z: Tree, x: Tensor) -> Tree:
    return equilibrium(problem, z, x, work=Work(), tol=MODEL_TOL, max_steps=500).value


def _mean(stack: Tensor) -> Tensor:
    """The mean over the batch, of size 1 there, in storage as `stack` is: `mean` alone would turn it over."""
    return torch.empty_like(stack[:1]).copy_(stack.mean(0, keepdim=True))


def metric_of(tangent: Tree) -> Tensor:
    """T^T T of each sample, (batch, d, d), for T = dz*/dx with leaves (batch, d, ...)."""
    return tree.total([rows @ rows.mT for rows in map(tree.stack_rows, tree.leaves(tangent))])


def damped_inverse(
    problem: Problem, start: State, tangent: Tree, matrix: Tensor, metric: Tensor, *, rate: float, work: Work
) -> Rule:
    """(H + damping G)^-1, for all samples or for each, with the least damping at which a first step moves z to where the
    tangent says.

    Where the cost does not see a direction that moves z, as with fewer measurements than latents, H^-1 turns what is
    still wrong with mu into hundreds of units of it, and has another curvature by then. So the move of z is damped (the
    method of Levenberg and Marquardt, in the metric of z); a direction that is flat because it hardly moves z does no harm.

    start: z at its equilibrium and mu as the solve begins.  matrix, metric: H and G = T^T T, (batch or 1, d, d); of one
    for all samples the damping is what all of them need.
    """
    values, vectors = _diagonalised(matrix, metric)
    with torch.no_grad():
        work.add(f=len(start.x), vjp=len(start.x), cost_grad=len(start.x))
        now, carried = problem.sweep(start), Step(rate, tangent=tangent)
        gradient = carried.reduced(now.x, start.mu, now.mu)
        moves = metric.diagonal(dim1=1, dim2=2).sum(1).sqrt()
        steepest = torch.linalg.vector_norm(tree.times(vectors.mT, gradient.flatten(1).double()), dim=1)
        # where x does not move z, the size of z says nothing about how far x may go: of z = 0 it would be nowhere at all
        steepest = torch.where(moves > 0, steepest / (FARTHEST * (tree.norm(start.z) + moves)), 0.0)
        # of each sample its own: a neighbour that is far steeper, or NaN, has no say in a sample's step
        steepest = steepest.amax(0, keepdim=True) if len(values) == 1 else steepest
        largest = torch.maximum(values.amax(1), steepest)
        # where the cost is flat to first and second order any finite step will do: 1 over the largest alone would overflow
        largest = largest.masked_fill(largest < torch.finfo(matrix.dtype).tiny, 1.0)[:, None]
        values = torch.maximum(values, FLOOR * largest)
        rule = Damped(vectors, values, torch.zeros_like(largest), torch.ones_like(largest), rate)
        undecided = torch.ones(len(values), dtype=torch.bool, device=values.device)
        for damping in DAMPINGS:
            rule = replace(rule, damping=torch.where(undecided[:, None], damping * largest, rule.damping))
            missed = _missed(problem, start, carried, rule.direction(rate * gradient), work=work)
            missed = missed.amax(0, keepdim=True) if len(values) == 1 else missed
            undecided = undecided & (missed > MOST_MISSED)
            if not bool(undecided.any()):
                break
    if bool((rule.damping > 0).any()):
        return rule
    inverse = ((vectors / values[:, None]) @ vectors.mT).to(matrix.dtype)
    return Matrix(inverse[0] if len(inverse) == 1 else inverse, rate)


def _missed(problem: Problem, start: State, step: Step, change: Tensor, *, work: Work) -> Tensor:
    """The relative residual of z after x has moved by -`change`, z taken along by the tangent of `step`."""
    dx = -change
    z = step.carry(start.z, dx)
    work.add(f=len(dx))
    f = problem.evaluate(z, start.x + dx)
    return relative(tree.apply(torch.sub, f, z), f)[0].nan_to_num(torch.inf)


def _diagonalised(matrix: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """|H| and G at once, in double precision: V^T H V = diag(values), V^T G V = 1. A sample whose matrices are not finite gets
    others that are: its state is not finite either, and that is what is to be reported."""
    eye = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    finite = (matrix.isfinite() & metric.isfinite()).flatten(1).all(1)[:, None, None]
    matrix, metric = (torch.where(finite, part.double(), eye) for part in (matrix, metric))
    # directions that do not move z at all have a curvature to be compared with too
    size = metric.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    root = torch.linalg.cholesky(metric + torch.where(size > 0, 0.01 * size, 1.0) * eye)
    half = torch.linalg.solve_triangular(root, matrix, upper=False)
    values, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(root, half.mT, upper=False))
    return values.abs(), torch.linalg.solve_triangular(root.mT, vectors, upper=True)


def _least_curvature(problem: Problem, x: Tensor, slope: Tensor) -> Tensor:
    """Where power iteration saw no curvature, steps are bounded by the size of the set, or by 1 for a free x. In the unit of
    the cost where `slope` (batch,), the norm of its gradient, is below 1: else the steps of a small cost would be short."""
    bounded = isinstance(problem.constraint, L2Ball | LinfBall)
    scale = torch.as_tensor(problem.constraint.scale if bounded else 1.0, dtype=x.dtype, device=x.device)
    return 1e-3 / scale * torch.where(slope > 0, slope.clamp_max(1.0), 1.0)
