"""Adversarial attacks: the image solved jointly with its equilibrium and adjoint, or by PGD with solves at every step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from jiio import tree
from jiio.cuda_graph import captured
from jiio.joint import equilibrium
from jiio.nested import nested
from jiio.optimizer import PGD
from jiio.problem import Problem, State
from jiio.schedule import Constant, Falling, Schedule
from jiio.solution import Solution, Work
from jiio.solve import solve
from jiio.solver import require_count
from jiio.step import Step
from jiio.tasks.attack_problem import ImageModel, Loss, against, attack_problem, check_loss, rivals
from jiio.tasks.threat import Threat

RESOLVE_TOL = 1e-4
AHEAD_STEPS = 10
# of sign steps, which at a constant length turn about wherever a pixel is best between its bounds
SHRINKING = Falling(start=1.0, end=0.05, factor=0.85)
# of 1 + |loss|: starts that end at the same maximum differ in rounding alone, and with that in the batch
SAME = 1e-5
RIVALS = 3  # of an attack by margins that is to miss nothing (docs/experiments.md)
GRADIENT_TOL = 1e-2  # of mu and x where a training takes its gradient, which errs by as much


@dataclass(frozen=True)
class JointAttack:
    """Joint steps of `rate` radii, each of the first ten extrapolated by `lookahead` of its last change.

    A step as long as the radius reaches any point of the ball; where the ball is active, project(x + rate radius g / |g|)
    is nearly the point that g points to, and a fixed point of that map is a maximum. Longer steps are as strong within
    ten steps and end at lower maxima (docs/experiments.md compares rates and lookaheads). What has not settled after ten steps
    swings: extrapolated further, images in a ball several times as wide as that of the training hardly came any higher.
    In the maximum norm steps are sign steps, which grow shorter: each but the first by 15 % down to a twentieth.

    loss: cross_entropy, or margin (the best other logit less the label's), which does not fade where the model is sure.
    solve_tol: relative residual of z at the start and at the end.  tol: of mu and x, at which an image is done; the loss
    errs by about tol^2, the gradient that a training takes there by about tol.
    restarts: solves of each image, the first from the clean image, the others from seeded random feasible points.
    mirror: images whose loss ends above it are attacked once more, from the opposite of the perturbation that was found, as
    far as the box allows: a second maximum mostly lies on the other side, and often is the higher one. inf: never; -inf:
    always. It raises the mean loss; most images above the default are fooled already, and targeted cross-entropies, with
    their sign turned, are never above 0.
    rivals: further solves of an untargeted attack, each for the margin of one other class over the label's: of those that
    the clean image is likeliest to be taken for, as far as there are so many. The class that is nearest at first, which the
    margin of the best other class follows, need not be the one within reach (docs/experiments.md, "Attacks").
    """

    steps: int = 20
    rate: float = 1.0
    lookahead: float = 1.25
    solve_tol: float = 1e-2
    tol: float = 1.5e-2
    restarts: int = 1
    mirror: float = 1.25
    rivals: int = 0
    loss: Loss = "cross_entropy"
    seed: int = 0

    warm: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self)

    def step(self, threat: Threat) -> Step:
        """The joint step; neither lag nor cut, which shorten steps: the constraint bounds them already."""
        return Step(threat.rule(self.rate), schedule=_schedule(threat), lag=None, cut=None, lookahead=self._ahead)

    def _ahead(self, k: int) -> float:
        return self.lookahead if k < AHEAD_STEPS else 0.0

    def run(self, problem: Problem, start: State, threat: Threat) -> Solution[State]:
        """One solve."""
        tol = (self.solve_tol, self.tol, self.tol)
        return solve(
            captured(problem), start, step=self.step(threat), max_steps=self.steps, tol=tol, on_failure="ignore"
        )


@dataclass(frozen=True)
class PGDAttack:
    """Projected gradient ascent (Madry et al. 2018) with full equilibrium and adjoint solves at every step: the baseline.

    rate: of the steps in radii; sign steps grow shorter as those of `JointAttack` do.
    warm: start each solve where the last one ended; else where the model starts, as when an attack library calls it.
    solve_tol: relative residual of the solves.  restarts, mirror, rivals, loss: as of `JointAttack`.
    """

    steps: int = 20
    rate: float = 3.0
    warm: bool = False
    solve_tol: float = 1e-2
    restarts: int = 1
    mirror: float = math.inf
    rivals: int = 0
    loss: Loss = "cross_entropy"
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)

    def run(self, problem: Problem, start: State, threat: Threat) -> Solution[State]:
        """`steps` steps, and a last solve where they end; the best x met is returned."""
        return nested(
            problem,
            start,
            optimizer=PGD(threat.rule(self.rate), _schedule(threat)),
            rounds=self.steps + 1,
            warm=self.warm,
            solve_tol=self.solve_tol,
        )


def _schedule(threat: Threat) -> Schedule:
    return Constant() if threat.norm == "l2" else SHRINKING


def _check(method: JointAttack | PGDAttack) -> None:
    require_count("steps", method.steps)
    require_count("restarts", method.restarts)
    # steps that are not finite would leave every image as it is, and call it robust
    if not 0 < method.rate < math.inf:
        raise ValueError(f"rate must be positive and finite, got {method.rate}")
    if isinstance(method, JointAttack) and not 0 <= method.lookahead < math.inf:
        raise ValueError(f"lookahead must be finite and not negative, got {method.lookahead}")
    if math.isnan(method.mirror):
        raise ValueError("mirror must be a loss, or inf for never; got nan")
    if not isinstance(method.rivals, Integral) or method.rivals < 0:
        raise ValueError(f"rivals must be a whole number, at least 0, got {method.rivals!r}")
    check_loss(method.loss)


Method = JointAttack | PGDAttack


@dataclass(frozen=True)
class Attack:
    """The strongest input found for each image, by its re-solved loss.

    images: attacked, feasible to 1e-6.  loss: re-solved, (batch,).  prediction: of the attacked image.  robust: whether
    every input that was tried is classified as labelled (targeted: not as the target).  resolved: whether the equilibria of
    all these inputs, the clean image among them, were solved to 1e-4, and neither their losses nor the residuals of the attack
    left the range of floats.  work: of the attack, the joint one's first equilibrium
    included, re-solving not.
    """

    images: Tensor
    loss: Tensor
    prediction: Tensor
    robust: Tensor
    resolved: Tensor
    work: Work


def attack(
    model: ImageModel, images: Tensor, labels: Tensor, threat: Threat, method: Method = JointAttack(), *,
    target: Tensor | None = None,
) -> Attack:  # fmt: skip
    """Attack `images` (batch, channels, height, width) of classes `labels` (batch,), without graph.

    No sample depends on its batch; none ends at a lower loss than the clean image has. `ValueError` for a target beside
    `rivals`, and as `attack_problem`.

    >>> from jiio.models import ClassifierConfig, classifier
    >>> model = classifier(ClassifierConfig(image_shape=(1, 8, 8), channels=(4,), patch=2))
    >>> found = attack(model, torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1]), Threat("l2", 0.5))
    >>> bool(((found.images - 0.5).flatten(1).norm(dim=1) <= 0.5 + 1e-6).all())
    True
    """
    if method.rivals and target is not None:
        raise ValueError("rivals belong to an untargeted attack; give a target or rivals, not both")
    with torch.no_grad():
        problem = attack_problem(model, images, labels, threat, loss=method.loss, target=target)
        readout, work, first = model.readout(), Work(), model.start(images)

        def candidate(problem: Problem, z: Any, x: Tensor, work: Work) -> tuple[_Candidate, Any]:
            x = problem.constraint.project(x)
            solved = equilibrium(problem, z, x, work=work, tol=RESOLVE_TOL, max_steps=200)
            logits, cost = readout(solved.value), problem.cost(solved.value, x, *problem.context)
            prediction = logits.argmax(1)
            robust = (prediction == problem.context[0]) == (target is None)
            return _Candidate(x, -cost, prediction, robust, solved.converged & cost.isfinite()), solved.value

        def attacked(problem: Problem, z: Any, x: Tensor, maximised: Problem | None = None) -> _Candidate:
            solution = method.run(maximised or problem, problem.start(x, z), threat)
            work.include(solution.work)
            found = candidate(problem, solution.value.z, solution.value.x, Work())[0]
            return found._replace(resolved=found.resolved & solution.residual.isfinite().all(1))

        best, solved = candidate(problem, first, images, work if method.warm else Work())
        z = solved if method.warm else first
        best = _stronger(best, attacked(problem, z, images))
        moved = (best.images != images).flatten(1).any(1)
        rows = (moved & (best.loss > method.mirror)).nonzero()[:, 0]
        if len(rows):
            opposite = 2 * images[rows] - best.images[rows]
            found = attacked(problem.select(rows), tree.select(z, rows), opposite)
            best = tree.put(best, rows, _stronger(tree.select(best, rows), found))
        for restart in range(1, method.restarts):
            best = _stronger(best, attacked(problem, z, threat.random(images, method.seed + restart)))
        for rival in rivals(readout(solved), problem.context[0], method.rivals):
            best = _stronger(best, attacked(problem, z, images, against(problem, readout, rival)))
    return Attack(best.images, best.loss, best.prediction, best.robust, best.resolved, work)


class _Candidate(NamedTuple):
    images: Tensor
    loss: Tensor
    prediction: Tensor
    robust: Tensor
    resolved: Tensor


def _stronger(old: _Candidate, new: _Candidate) -> _Candidate:
    better = new.loss > old.loss + SAME * (1 + old.loss.abs())
    stronger = tree.apply(lambda a, b: torch.where(tree.wide(better, a), b, a), old, new)
    # these two are said of all that was tried
    return stronger._replace(robust=old.robust & new.robust, resolved=old.resolved & new.resolved)
