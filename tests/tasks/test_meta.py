"""Meta-learning: exact outer gradient against differences and unrolling, safeguards, equal optima, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jiio import Adam, solve, tree
from jiio.joint import equilibrium
from jiio.models import ContextClassifier, ContextConfig, context_classifier
from jiio.problem import State
from jiio.solution import Work
from jiio.tasks.meta import PRIOR, SOLVER, Episode, MetaLoss, Query, adapt, adaptation, measured_curvature, start, step
from jiio.tasks.unrolled import UnrolledLoss

WAYS = 3


def model(dtype: torch.dtype = torch.float64) -> ContextClassifier:
    torch.manual_seed(0)
    config = ContextConfig(image_shape=(1, 8, 8), margin=0, channels=(4, 6), patch=2, width=8, film=3, features=4)
    made = context_classifier(config).to(dtype)
    with torch.no_grad():
        made.head.weight.mul_(1.5)
    return made


def episode(dtype: torch.dtype = torch.float64, tasks: int = 2, shots: int = 2) -> Episode:
    generator = torch.Generator().manual_seed(2)
    prototypes = torch.rand(tasks, WAYS, 1, 8, 8, generator=generator, dtype=dtype)

    def around(count: int) -> Tensor:
        noise = torch.rand(tasks, WAYS, count, 1, 8, 8, generator=generator, dtype=dtype)
        return (0.6 * prototypes[:, :, None] + 0.4 * noise).flatten(1, 2)

    labels = torch.arange(WAYS).repeat_interleave(shots).expand(tasks, -1)
    return Episode(around(shots), labels, around(shots), labels, WAYS)


def calibrated(dtype: torch.dtype = torch.float64) -> tuple[ContextClassifier, Episode]:
    net, given = model(dtype), episode(dtype)
    net.curvature.copy_(measured_curvature(net, given.support, given.support_labels, WAYS))
    return net, given


def bilevel(net: ContextClassifier, given: Episode) -> Tensor:
    """The outer loss, its inner problem solved far beyond need."""
    with torch.no_grad():
        solution = adapt_well(net, given)
        query = Query(net, tol=1e-11)
        logits = query(solution.value, given.support_labels, given.query, WAYS)
        return F.cross_entropy(logits.flatten(0, 1), given.query_labels.flatten())


def adapt_well(net: ContextClassifier, given: Episode):
    problem = adaptation(net, given.support, given.support_labels, WAYS)
    return solve(problem, start(net, given.support, WAYS), step=step(net), solver=SOLVER, max_steps=3000, tol=1e-11)


def test_the_exact_outer_gradient_agrees_with_differences_of_the_whole_loss() -> None:
    net, given = calibrated()
    loss = MetaLoss(net, steps=3000, linear_tol=1e-10, linear_steps=1000)
    loss.query = Query(net, tol=1e-11)
    loss.solve = lambda problem, first: adapt_well(net, given)  # pyright: ignore[reportAttributeAccessIssue]
    value, _, _ = loss(given)
    parameters = [p for p in net.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(value, parameters)
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    eps, values = 2e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=sign * eps)
        values.append(bilevel(net, given).item())
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.sub_(d, alpha=sign * eps)
    assert slope == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-5)


def test_the_first_order_gradient_drops_a_part_that_is_there() -> None:
    net, given = calibrated()
    parameters = list(net.parameters())

    def gradient(kind) -> Tensor:
        value, _, _ = MetaLoss(net, gradient=kind, steps=300, linear_tol=1e-6, linear_steps=300)(given)
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])

    exact, first = gradient("exact"), gradient("first_order")
    cosine = float(torch.cosine_similarity(exact, first, dim=0))
    assert 0.3 < cosine < 0.99999
    assert float((exact - first).norm()) > 1e-3 * float(exact.norm())


def test_joint_and_nested_adaptation_find_the_same_vector_and_joint_with_less_work() -> None:
    net, given = calibrated()
    joint = MetaLoss(net, steps=300)(given)[2]
    nested = MetaLoss(net, steps=80, optimizer=Adam(0.1))(given)[2]
    assert bool(joint.converged.all())
    assert float((joint.cost - nested.cost).abs().max()) < 1e-2 * float(nested.cost.mean())
    assert joint.work.f + joint.work.vjp < (nested.work.f + nested.work.vjp) / 4


@pytest.mark.parametrize("curvature", [1.0, 1e-3])
def test_no_task_ends_worse_than_at_its_start(curvature: float) -> None:
    """Even where the curvature, and with it the step, is a thousand times wrong."""
    net, given = model(torch.float32), episode(torch.float32)
    scale = float(measured_curvature(net, given.support, given.support_labels, WAYS))
    net.curvature.fill_(curvature * scale)
    problem = adaptation(net, given.support, given.support_labels, WAYS)
    first = start(net, given.support, WAYS)
    with torch.no_grad():
        z = equilibrium(problem, first.z, first.x, work=Work(), tol=1e-5).value
        before = problem.cost(z, first.x, *problem.context)
        found = adapt(net, given.support, given.support_labels, WAYS, on_failure="ignore")
        z = equilibrium(problem, found.value.z, found.value.x, work=Work(), tol=1e-5).value
        after = problem.cost(z, found.value.x, *problem.context)
    assert bool((after <= before * 1.001).all())


def test_a_task_does_not_depend_on_the_others() -> None:
    net, given = calibrated()
    together = adapt(net, given.support, given.support_labels, WAYS, max_steps=200)
    alone = adapt(net, given.support[1:], given.support_labels[1:], WAYS, max_steps=200)
    assert float((together.value.x[1] - alone.value.x[0]).abs().max()) < 1e-10


def test_query_images_see_nothing_of_each_other() -> None:
    net, given = calibrated()
    solution = adapt(net, given.support, given.support_labels, WAYS)
    with torch.no_grad():
        whole = Query(net)(solution.value, given.support_labels, given.query, WAYS)
        part = Query(net)(solution.value, given.support_labels, given.query[:, :2], WAYS)
    assert float((whole[:, :2] - part).abs().max()) < 1e-10


def test_logits_follow_a_permutation_of_the_classes() -> None:
    net, given = calibrated()
    order = torch.tensor([2, 0, 1])
    a = MetaLoss(net, steps=100)(given)[1]
    relabelled = given._replace(support_labels=order[given.support_labels], query_labels=order[given.query_labels])
    b = MetaLoss(net, steps=100)(relabelled)[1]
    assert (b[..., order] - a).detach().abs().max() < 1e-8


@pytest.mark.parametrize("optimizer", [None, Adam(0.1)])
@pytest.mark.parametrize("gradient", ["exact", "first_order"])
def test_without_steps_the_model_is_a_prototypical_network(optimizer, gradient) -> None:
    net, given = calibrated()
    loss = MetaLoss(net, gradient=gradient, steps=0, optimizer=optimizer)
    loss.query = Query(net, tol=1e-9)
    value, logits, solution = loss(given)
    assert not bool(solution.value.x.any())
    problem, first = adaptation(net, given.support, given.support_labels, WAYS), start(net, given.support, WAYS)
    with torch.no_grad():
        z = equilibrium(problem, first.z, first.x, work=Work(), tol=1e-9, max_steps=500).value
        expected = loss.query(State(z, first.mu, first.x), given.support_labels, given.query, WAYS)
    assert float((logits - expected).detach().abs().max()) < 1e-2 * float(expected.abs().max())
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(value, [net.head.weight]))


def test_mdeq_adapts_too() -> None:
    config = ContextConfig(
        image_shape=(1, 8, 8), margin=0, channels=(8, 8), patch=2, width=8, film=3, features=4, cell="mdeq"
    )
    torch.manual_seed(0)
    net, given = context_classifier(config), episode(torch.float32)
    value, logits, _ = MetaLoss(net, gradient="first_order", steps=5)(given)
    value.backward()
    assert logits.shape == (2, 6, WAYS)
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)


def test_bad_input_is_refused() -> None:
    net, given = model(torch.float32), episode(torch.float32)
    with pytest.raises(ValueError, match="at least one support image"):
        adapt(net, given.support, torch.zeros_like(given.support_labels), WAYS)
    with pytest.raises(ValueError, match="between 0 and 1"):
        adapt(net, given.support, given.support_labels, 2)
    with pytest.raises(ValueError, match="at least 2 classes"):
        adapt(net, given.support, torch.zeros_like(given.support_labels), 1)
    with pytest.raises(ValueError, match="have shape"):
        adapt(net, given.support[0], given.support_labels, WAYS)
    with pytest.raises(ValueError, match="gradient must be"):
        MetaLoss(net, gradient="second")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="features"):
        replace(net.config, features=0)


def unrolled_loss(net: ContextClassifier, given: Episode, *, rounds: int, inner: int, prior: float) -> Tensor:
    """The outer loss as a function of the model through `rounds` gradient steps, each with z and mu from `inner` plain
    steps, all kept in the graph (MAML, with unrolled equilibria)."""
    problem = adaptation(net, given.support, given.support_labels, given.ways, prior=prior)
    z, mu, x = start(net, given.support, given.ways)
    rate = 1 / float(net.curvature)

    def gradients():
        # copies, because z depends on x by its history: these are partial derivatives
        return problem.gradients(State(tree.apply(lambda leaf: leaf + 0, z), mu, x + 0), graph=True)

    for _ in range(rounds):
        for _ in range(inner):
            now = gradients()
            z, mu = now.f, now.z
        x = x - rate * gradients().x
    for _ in range(inner):
        z = problem.evaluate(z, x)
    logits = Query(net, tol=1e-9)(State(z, mu, x), given.support_labels, given.query, given.ways)
    return F.cross_entropy(logits.flatten(0, 1), given.query_labels.flatten())


def compare_with_unrolled(
    net: ContextClassifier, given: Episode, *, rounds: int, inner: int, prior: float = PRIOR
) -> tuple[float, float]:
    """Relative errors: of the exact gradient against the unrolled one, of that against one with half the rounds."""
    parameters = list(net.parameters())

    def flat(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    long, short = (flat(unrolled_loss(net, given, rounds=n, inner=inner, prior=prior)) for n in (rounds, rounds // 2))
    exact_loss = MetaLoss(net, prior=prior, linear_tol=1e-8, linear_steps=2000)
    exact_loss.query = Query(net, tol=1e-9)
    exact_loss.solve = lambda problem, first: solve(  # pyright: ignore[reportAttributeAccessIssue]
        problem, first, step=step(net), solver=SOLVER, max_steps=3000, tol=1e-9, on_failure="ignore"
    )
    exact = flat(exact_loss(given)[0])
    return float((exact - long).norm() / long.norm()), float((short - long).norm() / long.norm())


def test_the_exact_outer_gradient_agrees_with_an_unrolled_solve() -> None:
    net, given = calibrated()
    net.curvature.copy_(measured_curvature(net, given.support, given.support_labels, WAYS, prior=0.5))
    error, unfinished = compare_with_unrolled(net, given, rounds=16, inner=20, prior=0.5)
    assert unfinished < 3e-4
    assert error < 1e-3


def test_the_unrolled_gradient_is_that_of_what_was_computed() -> None:
    """Against differences along a random direction of all weights; few steps, far from convergence."""
    net, given = calibrated()
    loss = UnrolledLoss(net, steps=2, iterations=3)
    loss.query = Query(net, tol=1e-11)
    parameters = list(net.parameters())
    value, _, solution = loss(given)
    gradients = torch.autograd.grad(value, parameters)
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    eps, values = 1e-5, []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=sign * eps)
            values.append(loss(given)[0].item())
    assert slope == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-5)
    assert not bool(solution.converged.any())  # and says so
