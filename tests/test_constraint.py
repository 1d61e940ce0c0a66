from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jiio import Box, Constraint, Free, Intersection, L2Ball, LinfBall, Simplex

DOUBLE = torch.float64
CENTER = torch.linspace(-0.2, 0.4, 15, dtype=DOUBLE).view(3, 5)
SETS: dict[str, Constraint] = {
    "free": Free(),
    "box": Box(-0.3, 0.4),
    "per-sample box": Box(CENTER - 0.1, CENTER + 0.3),
    "l2": L2Ball(CENTER, 0.7),
    "per-sample l2": L2Ball(CENTER, torch.tensor([0.3, 0.7, 1.1], dtype=DOUBLE)),
    "linf": LinfBall(CENTER, 0.25),
    "simplex": Simplex(1.5),
    "l2 and box": Intersection(L2Ball(CENTER, 0.5), Box(0.0, 1.0)),
    "linf and box": Intersection(LinfBall(CENTER, 0.5), Box(0.0, 1.0)),
    "two balls": Intersection(L2Ball(CENTER, 0.6), L2Ball(CENTER + 0.2, 0.5)),
    "simplex and ball": Intersection(Simplex(1.0), L2Ball(torch.full((1, 5), 0.2, dtype=DOUBLE), 0.3)),
}
EACH = pytest.mark.parametrize("constraint", SETS.values(), ids=SETS)


def points(seed: int = 0, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(3, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


@EACH
def test_projection_lands_in_the_set_and_stays(constraint: Constraint) -> None:
    p = constraint.project(points())
    assert bool(constraint.contains(p, 1e-6).all())
    assert float((constraint.project(p) - p).abs().max()) < 1e-6


@EACH
def test_projection_is_the_nearest_point(constraint: Constraint) -> None:
    """<x - p, q - p> <= 0 for every q in the set."""
    x = points(1, 2.0)
    p = constraint.project(x)
    for seed in range(40):
        q = constraint.project(points(seed + 10, 1.5))
        assert float(((x - p) * (q - p)).sum(1).max()) < 1e-5


@EACH
def test_projection_does_not_expand(constraint: Constraint) -> None:
    a, b = points(2), points(3)
    shrunk = (constraint.project(a) - constraint.project(b)).norm(dim=1)
    assert bool((shrunk <= (a - b).norm(dim=1) + 1e-7).all())


@EACH
def test_a_point_inside_is_left_alone(constraint: Constraint) -> None:
    inside = sum(constraint.project(points(seed)) for seed in range(8)) / 8
    assert float((constraint.project(inside) - inside).abs().max()) < 1e-6


@EACH
def test_batch_projection_equals_single_projections(constraint: Constraint) -> None:
    x = points(4, 2.0)
    together = constraint.project(x)
    for i in range(3):
        row = torch.tensor([i])
        assert float((constraint.select(row).project(x[row]) - together[row]).abs().max()) < 1e-8


@EACH
def test_derivative_of_the_projection_matches_finite_differences(constraint: Constraint) -> None:
    """Outside the set, so that faces and spheres are active."""
    x = points(5, 2.0).requires_grad_()
    direction, weight = points(6), points(7)
    (gradient,) = torch.autograd.grad((constraint.project(x) * weight).sum(), x)
    with torch.no_grad():
        eps = 1e-5
        ahead, behind = constraint.project(x + eps * direction), constraint.project(x - eps * direction)
        expected = ((ahead - behind) * weight).sum() / (2 * eps)
    assert abs(float((gradient * direction).sum() - expected)) < 1e-4 * max(1.0, abs(float(expected)))


def test_clipping_after_the_ball_is_feasible_but_not_the_projection() -> None:
    ball, box = L2Ball(torch.full((1, 2), 0.9, dtype=DOUBLE), 0.5), Box(0.0, 1.0)
    x = torch.tensor([[3.0, 0.5]], dtype=DOUBLE)
    exact, sequential = Intersection(ball, box).project(x), box.project(ball.project(x))
    assert bool(Intersection(ball, box).contains(sequential, 1e-9).all())
    assert float((x - exact).norm()) < float((x - sequential).norm()) - 1e-3


def test_images_are_projected_like_vectors() -> None:
    center = CENTER.view(3, 1, 5, 1)
    both = Intersection(L2Ball(center, 0.5), Box(0.0, 1.0)).project(points().view(3, 1, 5, 1))
    flat = Intersection(L2Ball(CENTER, 0.5), Box(0.0, 1.0)).project(points())
    assert torch.allclose(both.flatten(1), flat)


def test_float32_attack_stays_inside_ball_and_box() -> None:
    center = torch.rand(64, 784, generator=torch.Generator().manual_seed(0))
    x = center + torch.randn(64, 784, generator=torch.Generator().manual_seed(1))
    p = Intersection(L2Ball(center, 1.0), Box(0.0, 1.0)).project(x)
    assert float((p - center).norm(dim=1).max()) < 1 + 1e-6
    assert float(p.min()) >= 0 and float(p.max()) <= 1


def test_scale_is_the_radius() -> None:
    assert Free().scale == 1.0
    assert L2Ball(CENTER, 0.7).scale == 0.7
    assert Intersection(L2Ball(CENTER, 0.7), Box(0.0, 1.0)).scale == pytest.approx(0.7)


def test_bad_input_is_named() -> None:
    cases = [
        (lambda: L2Ball(CENTER, -1.0), "positive radius, got -1.0"),
        (lambda: LinfBall(CENTER, 0.0), "positive radius, got 0.0"),
        (lambda: Box(1.0, 0.0), "lower <= upper everywhere, got 1.0 and 0.0"),
        (lambda: Simplex(0.0), "positive total, got 0.0"),
        (lambda: Intersection(), "at least one"),
        (lambda: L2Ball(CENTER, 1.0).project(torch.zeros(3, 4)), r"center of shape \(3, 5\).*\(3, 4\)"),
        (lambda: Box(torch.zeros(2, 5), 1.0).project(torch.zeros(3, 5)), r"lower of shape \(2, 5\).*\(3, 5\)"),
        (lambda: Intersection(Box(0.0, 1.0), Box(2.0, 3.0)).project(CENTER), "do not meet"),
        (lambda: Intersection(L2Ball(CENTER - 9, 1.0), Box(0.0, 1.0)).project(CENTER), "do not meet"),
        (lambda: Intersection(L2Ball(CENTER - 9, 1.0), L2Ball(CENTER, 1.0)).project(CENTER), "do not seem to meet"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
