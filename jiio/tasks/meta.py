"""Gradient-based meta-learning: a task vector fitted to a few labelled examples, solved jointly with their equilibria.

    inner, for each task:   min over x of   CE(support; z, x) + prior/2 |x|^2     subject to   z = f(z, x)
    outer:                  CE(query; z_q, x*)     with     z_q = f(z_q, x*)

(JIIO paper, meta-learning experiment.) One batch element is one task, its support images inside. The outer loss is not the
inner cost: its gradient needs a linear solve ("exact") or is biased ("first_order").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jiio import tree
from jiio.curvature import curvature
from jiio.deq import DEQ
from jiio.implicit import implicit
from jiio.joint import equilibrium
from jiio.nested import nested
from jiio.optimizer import Optimizer
from jiio.precondition import Scalar
from jiio.problem import Problem, State
from jiio.solution import OnFailure, Solution, Work
from jiio.solve import solve
from jiio.solver import Anderson, Delayed
from jiio.step import Step

PRIOR = 0.02
RATE = 0.5
SOLVER = Delayed(Anderson(6), after=10)
Gradient = Literal["exact", "first_order"]


class Episode(NamedTuple):
    """Tasks. support (tasks, S, channels, height, width) with labels (tasks, S); query likewise; labels 0 to ways - 1."""

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor
    ways: int


class ContextModel(Protocol):
    """What the meta-learning tasks need of a model; `jiio.models.ContextClassifier` is one."""

    curvature: Tensor

    @property
    def config(self) -> Any:
        """With `film` and `features`, the sizes of the task vector's parts."""
        ...

    def inject(self, images: Tensor) -> Any:
        """What of the images enters the cell."""
        ...

    def cell(self) -> Callable[[Any, Tensor, Any], Any]:
        """f(z, v, e) with weights bound once."""
        ...

    def features(self) -> Callable[[Any], Tensor]:
        """z -> features (images, features)."""
        ...

    def logits(self) -> Callable[[Tensor, Tensor], Tensor]:
        """(features, centres) -> logits."""
        ...

    def start(self, images: Tensor) -> Any:
        """A first z for images."""
        ...


def check_episode(support: Tensor, labels: Tensor, ways: int) -> None:
    """`ValueError` for shapes that do not fit, for fewer than 2 classes, and for a class without an example."""
    if support.dim() != 5 or labels.shape != support.shape[:2]:
        raise ValueError(
            f"support images have shape (tasks, images, channels, height, width) and labels (tasks, images); got "
            f"{tuple(support.shape)} and {tuple(labels.shape)}"
        )
    if ways < 2:
        raise ValueError(f"a task needs at least 2 classes, got {ways}")
    if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < ways):
        raise ValueError(f"labels of {ways} classes lie between 0 and {ways - 1}, got {labels.min()} to {labels.max()}")
    if not bool((F.one_hot(labels, ways).sum(1) > 0).all()):
        raise ValueError("every class of a task needs at least one support image")


def adaptation(model: ContextModel, support: Tensor, labels: Tensor, ways: int, *, prior: float = PRIOR) -> Problem:
    """Fit task vectors x (tasks, film + ways features) to labelled images.

    Binds the model's weights: with graph where gradients are enabled, without under `no_grad`.
    """
    check_episode(support, labels, ways)
    f, read, compare = model.cell(), model.features(), model.logits()
    tasks, count = labels.shape
    injected = _by_task(model.inject(support.flatten(0, 1)), tasks)

    def cell(z: Any, x: Tensor, e: Any, label: Tensor, share: Tensor) -> Any:
        return _by_task(f(_flat(z), _film(model, x, count), _flat(e)), len(x))

    def cost(z: Any, x: Tensor, e: Any, label: Tensor, share: Tensor) -> Tensor:
        found = read(_flat(z)).unflatten(0, (len(x), count))
        logits = compare(found, centers(model, share @ found, x))
        loss = F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none")
        return loss.view(len(x), count).mean(1) + 0.5 * prior * x.square().sum(1)

    return Problem(cell, cost, context=(injected, labels, shares(labels, ways).to(support)))


def shares(labels: Tensor, ways: int) -> Tensor:
    """The matrix (tasks, ways, images) that takes each class's mean over its examples."""
    member = F.one_hot(labels, ways).mT
    return member / member.sum(2, keepdim=True)


def centers(model: ContextModel, means: Tensor, x: Tensor) -> Tensor:
    """Where each class sits: the mean feature of its examples plus its entries of x, (tasks, ways, features)."""
    return means + x[:, model.config.film :].view_as(means)


def _film(model: ContextModel, x: Tensor, count: int) -> Tensor:
    return x[:, : model.config.film].repeat_interleave(count, dim=0)


def _flat(z: Any) -> Any:
    return tree.apply(lambda leaf: leaf.flatten(0, 1), z)


def _by_task(z: Any, tasks: int) -> Any:
    return tree.apply(lambda leaf: leaf.unflatten(0, (tasks, -1)), z)


def start(model: ContextModel, support: Tensor, ways: int) -> State:
    """x = 0, z = 0."""
    x = support.new_zeros(len(support), model.config.film + ways * model.config.features)
    z = _by_task(model.start(support.flatten(0, 1)), len(support))
    return State(z, tree.apply(torch.zeros_like, z), x)


def step(model: ContextModel, rate: float = RATE) -> Step:
    """Plain steps measured by the model's largest curvature, safeguarded for each task."""
    return Step(Scalar(rate, scale=1 / float(model.curvature)))


def measured_curvature(
    model: ContextModel, support: Tensor, labels: Tensor, ways: int, *, prior: float = PRIOR
) -> Tensor:
    """The largest curvature of the support objective at x = 0 over the tasks, by power iteration; a scalar."""
    with torch.no_grad():
        problem = adaptation(model, support, labels, ways, prior=prior)
        first = start(model, support, ways)
        z = equilibrium(problem, first.z, first.x, work=Work(), tol=1e-3).value
    return curvature(problem, z, first.x, steps=6).amax()


def adapt(
    model: ContextModel, support: Tensor, labels: Tensor, ways: int, *, prior: float = PRIOR, max_steps: int = 100,
    on_failure: OnFailure = "warn",
) -> Solution[State]:  # fmt: skip
    """The joint solve of each task from x = 0, without graph."""
    with torch.no_grad():
        problem = adaptation(model, support, labels, ways, prior=prior)
        first = start(model, support, ways)
        return solve(problem, first, step=step(model), solver=SOLVER, max_steps=max_steps, on_failure=on_failure)


class Query(nn.Module):
    """Logits (tasks, images, ways) of query images under adapted task vectors; the exact gradient in both and in the
    model. Query images see nothing of each other."""

    def __init__(self, model: ContextModel, *, tol: float = 1e-3, on_failure: OnFailure = "ignore"):
        super().__init__()
        self.model: ContextModel = model
        self.tol = tol
        self.on_failure: OnFailure = on_failure

    def forward(self, state: State, support_labels: Tensor, query: Tensor, ways: int) -> Tensor:
        """`state`: the solution of `adaptation`, or what `implicit` makes of it."""
        model, (tasks, count) = self.model, query.shape[:2]
        f, read = model.cell(), model.features()
        images = query.flatten(0, 1)
        deq = DEQ(f, tol=self.tol, gradient_tol=self.tol, on_failure=self.on_failure)
        z = deq(_film(model, state.x, count), model.start(images), model.inject(images))
        found = read(z).unflatten(0, (tasks, count))
        seen = read(_flat(state.z)).unflatten(0, support_labels.shape)
        return model.logits()(found, centers(model, shares(support_labels, ways).to(seen) @ seen, state.x))


class MetaLoss(nn.Module):
    """forward(episode) -> (loss, query logits, solution of the adaptation).

    gradient: "exact" differentiates the adapted task vector and equilibria implicitly; "first_order" holds the vector
    constant (its equilibria are still differentiated) and drops the path through it: cheaper and biased.
    optimizer: None for the joint solve; one of the project's optimisers for nested adaptation, whose exact gradient is
    that of implicit MAML (Rajeswaran et al. 2019).  steps: of the joint solve, or rounds of the nested one; 0 for none:
    a prototypical network.
    """

    def __init__(
        self, model: ContextModel, *, gradient: Gradient = "exact", prior: float = PRIOR, steps: int = 20,
        optimizer: Optimizer | None = None, warm: bool = False, linear_tol: float = 1e-2, linear_steps: int = 40,
    ):  # fmt: skip
        super().__init__()
        if gradient not in ("exact", "first_order"):
            raise ValueError(f"gradient must be 'exact' or 'first_order', got {gradient!r}")
        if steps < 0:
            raise ValueError(f"steps must not be negative, got {steps}")
        self.model: ContextModel = model
        self.gradient, self.prior, self.steps = gradient, prior, steps
        self.optimizer, self.warm = optimizer, warm
        self.linear_tol, self.linear_steps = linear_tol, linear_steps
        self.query = Query(model)

    def forward(self, episode: Episode) -> tuple[Tensor, Tensor, Solution[State]]:
        """The mean cross-entropy of the query images."""
        problem = adaptation(self.model, episode.support, episode.support_labels, episode.ways, prior=self.prior)
        solution = self.solve(problem, start(self.model, episode.support, episode.ways))
        state = self.attach(problem, solution, episode)
        logits = self.query(state, episode.support_labels, episode.query, episode.ways)
        return F.cross_entropy(logits.flatten(0, 1), episode.query_labels.flatten()), logits, solution

    def solve(self, problem: Problem, first: State) -> Solution[State]:
        """The adaptation, without graph. Of one step or round the start is returned, x = 0, its equilibrium and cost
        evaluated: what 0 steps are to return."""
        if self.optimizer is not None:
            return nested(problem, first, optimizer=self.optimizer, rounds=max(self.steps, 1), warm=self.warm)
        steps = max(self.steps, 1)
        return solve(problem, first, step=step(self.model), solver=SOLVER, max_steps=steps, on_failure="ignore")

    def attach(self, problem: Problem, solution: Solution[State], episode: Episode) -> State:
        """The solution as a function of the model's parameters, as `gradient` says."""
        if self.gradient == "exact" and self.steps:
            return implicit(solution, tol=self.linear_tol, max_steps=self.linear_steps, on_failure="ignore")
        x = solution.value.x
        f, count = self.model.cell(), episode.support.shape[1]
        images = episode.support.flatten(0, 1)
        deq = DEQ(f, tol=1e-3, gradient_tol=1e-3, on_failure="ignore")
        z = deq(_film(self.model, x, count), _flat(solution.value.z), self.model.inject(images))
        return State(_by_task(z, len(x)), solution.value.mu, x)
