from __future__ import annotations

import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from jiio import Box, Constraint, Free, Intersection, L2Ball, LinfBall, Simplex

DOUBLE = torch.float64
CENTER = torch.linspace(-0.2, 0.4, 15, dtype=DOUBLE).view(3, 5)


@dataclass(frozen=True)
class Halfspace(Constraint):
    """A user's own set: the entries sum to at most `limit`."""

    limit: float

    def project(self, x: Tensor) -> Tensor:
        excess = (x.flatten(1).sum(1) - self.limit).clamp_min(0) / x[0].numel()
        return x - excess.view(-1, *[1] * (x.dim() - 1))

    def select(self, rows: Tensor) -> Halfspace:
        return self


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
    "ball around a point outside the box": Intersection(L2Ball(CENTER - 0.1, 0.9), Box(0.0, 1.0)),
    "two balls and box": Intersection((L2Ball(CENTER, 0.6), L2Ball(CENTER + 0.2, 0.5), Box(-0.1, 0.6))),
    "simplex and box": Intersection(Simplex(1.0), Box(0.05, 0.4)),
    "simplex and ball": Intersection(Simplex(1.0), L2Ball(torch.full((1, 5), 0.2, dtype=DOUBLE), 0.3)),
    "three balls": Intersection(*(L2Ball(CENTER + shift, 0.6) for shift in (0.0, 0.1, 0.2))),
    "own set and box": Intersection(Halfspace(0.6), Box(-0.2, 0.5)),
}
# too small for the first centre, which has an entry at -0.2, to reach the box [0, 1]
FIRST = torch.tensor([0.1, 0.5, 0.5], dtype=DOUBLE)
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
    """<x - p, q - p> <= 0 for every q in the set; |p - nearest|^2 is at most what is left."""
    rows = torch.arange(3).repeat_interleave(40)
    q = constraint.select(rows).project(torch.cat([points(10), *[points(11 + i, 1.5) for i in range(39)]]))
    for spread in (0.5, 2.0, 50.0):
        x = points(1, spread)
        p = constraint.project(x)
        assert float(((x - p)[rows] * (q - p[rows])).sum(1).max()) < 1e-6 * max(1.0, spread)


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


@pytest.mark.parametrize("spread", [10.0, 1e3, 1e5])
def test_far_points_reach_the_same_face(spread: float) -> None:
    """Alternating methods stand still for long there: simplex and ball, x far along e_1, has its answer in closed form."""
    center = torch.full((1, 5), 0.2, dtype=DOUBLE)
    x = torch.zeros(1, 5, dtype=DOUBLE)
    x[0, 0] = spread
    direction = torch.tensor([[4.0, -1, -1, -1, -1]], dtype=DOUBLE) / 20**0.5
    found = Intersection(Simplex(1.0), L2Ball(center, 0.2)).project(x)
    assert torch.allclose(found, center + 0.2 * direction, atol=1e-9)


def test_ball_and_box_meet_the_conditions_of_optimality() -> None:
    """p = clip(c + s (x - c)) for one s in (0, 1] a sample, on the sphere wherever s < 1."""
    center, x = CENTER + 0.2, points(3, 4.0)
    p = Intersection(L2Ball(center, 0.5), Box(0.0, 1.0)).project(x)
    inside = (p > 1e-9) & (p < 1 - 1e-9)
    for i in range(3):
        ratios = ((p - center) / (x - center))[i][inside[i]]
        assert len(ratios) > 0 and float(ratios.max() - ratios.min()) < 1e-10
        assert 0 < float(ratios[0]) < 1
        assert float((p - center)[i].norm()) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("name", ["l2", "l2 and box", "simplex and box", "simplex and ball", "two balls and box"])
def test_first_and_second_derivatives_pass_gradcheck(name: str) -> None:
    x = points(5, 2.0).requires_grad_()
    assert torch.autograd.gradcheck(SETS[name].project, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(SETS[name].project, (x,), fast_mode=True)


def test_centre_radius_and_bounds_have_derivatives_too() -> None:
    x = points(8, 2.0)
    center, radius = (CENTER + 0.3).requires_grad_(), torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    upper = torch.full((3, 5), 0.7, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda c, r, u: Intersection(L2Ball(c, r), Box(0.0, u)).project(x), (center, radius, upper)
    )


def test_a_constant_does_not_look_differentiable() -> None:
    assert not SETS["l2 and box"].project(points()).requires_grad


@EACH
def test_a_sample_of_nan_stays_alone(constraint: Constraint) -> None:
    x = points(9, 2.0)
    clean = constraint.project(x)
    x[1] = torch.nan
    found = constraint.project(x)
    assert not bool(found[1].isfinite().any())
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


@EACH
def test_dtype_follows_x(constraint: Constraint) -> None:
    found = constraint.project(points(4, 2.0).float())
    assert found.dtype == torch.float32
    assert float((found - constraint.project(points(4, 2.0))).abs().max()) < 1e-4


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


def test_scale_of_a_box_is_half_its_width() -> None:
    assert Box(-0.1, 0.3).scale == pytest.approx(0.2)
    assert Box(0.0, torch.inf).scale == 1.0
    upper = torch.tensor([[1.0, 2.0], [4.0, torch.inf]])
    assert torch.as_tensor(Box(0.0, upper).scale).tolist() == [1.0, 1.0]
    assert Intersection(Box(0.0, 1.0), Free()).scale == 0.5


def test_bad_input_is_named() -> None:
    cases = [
        (lambda: L2Ball(CENTER, -1.0), "positive radius, got -1.0"),
        (lambda: LinfBall(CENTER, 0.0), "positive radius, got 0.0"),
        (lambda: Box(1.0, 0.0), "lower <= upper everywhere, got 1.0 and 0.0"),
        (lambda: Simplex(0.0), "positive, finite total, got 0.0"),
        (lambda: L2Ball(CENTER, torch.ones(2)), r"radius of shape \(2,\).*\(3, 5\)"),
        (lambda: L2Ball(CENTER[:1], torch.ones(2)).project(CENTER), r"radius of shape \(2,\).*\(3, 5\)"),
        (lambda: L2Ball(CENTER, torch.nan), "positive radius, got nan"),
        (lambda: Simplex().project(CENTER[0]), r"beside the batch, got \(5,\)"),
        (lambda: Intersection(), "at least one"),
        (lambda: Intersection(((0.0, 1.0),)), r"of constraints, got \(0.0, 1.0\)"),  # pyright: ignore
        (lambda: L2Ball(CENTER, 1.0).project(torch.zeros(3, 4)), r"center of shape \(3, 5\).*\(3, 4\)"),
        (lambda: Box(torch.zeros(2, 5), 1.0).project(torch.zeros(3, 5)), r"lower of shape \(2, 5\).*\(3, 5\)"),
        (lambda: Intersection(Box(0.0, 1.0), Box(2.0, 3.0)).project(CENTER), "do not meet"),
        (lambda: Intersection(L2Ball(CENTER - 9, 1.0), Box(0.0, 1.0)).project(CENTER), "do not meet"),
        (lambda: Intersection(L2Ball(CENTER - 9, 1.0), L2Ball(CENTER, 1.0)).project(CENTER), r"samples \[0, 1, 2\]"),
        (lambda: Intersection(L2Ball(CENTER, FIRST), Box(0.0, 1.0)).project(CENTER), r"meet for samples \[0\]"),
        (lambda: Intersection(Simplex(1.0), Box(0.0, 0.1)).project(CENTER), "sum to 1.0"),
        (lambda: Intersection(Simplex(1.0), Simplex(2.0)).project(CENTER), r"totals \[1.0, 2.0\]"),
        (lambda: Intersection(Halfspace(-1.0), Box(0.0, 1.0)).project(CENTER), "do not meet, or meet too flatly"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_an_intersection_that_has_projected_can_be_pickled() -> None:
    both = SETS["l2 and box"]
    x = torch.linspace(-2, 2, 15, dtype=DOUBLE).view(3, 5)
    there = both.project(x)
    assert torch.equal(pickle.loads(pickle.dumps(both)).project(x), there)
