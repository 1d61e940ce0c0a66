"""What an intersection keeps between projections, and points so far away that their squares overflow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jiio import Box, Constraint, Intersection, L2Ball, LinfBall, Problem, Solution, State, implicit, solve

DOUBLE = torch.float64
FAR = torch.tensor([[2.0, 1.0], [-1.0, 3.0], [4.0, -2.0]], dtype=DOUBLE)


def centre() -> Tensor:
    return torch.full((3, 2), 0.02, dtype=DOUBLE, requires_grad=True)


def solved(constraint: Constraint) -> Solution[State]:
    def cost(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (z - y).square().sum(1)

    context = (torch.tensor([[1.0, 0.5]], dtype=DOUBLE).expand(3, 2),)
    problem = Problem(lambda z, x, y: 0.5 * torch.tanh(z) + x, cost, constraint, context=context)
    zeros = torch.zeros(3, 2, dtype=DOUBLE)
    return solve(problem, problem.start(zeros, zeros), tol=1e-9)


@pytest.mark.parametrize("ball", [L2Ball, LinfBall])
def test_a_solve_without_grad_leaves_the_centre_its_derivative(ball: type[L2Ball | LinfBall]) -> None:
    gradients = []
    for enabled in (True, False):
        c = centre()
        with torch.set_grad_enabled(enabled):
            solution = solved(Intersection(ball(c, 0.1), Box(-0.5, 0.3)))
        gradients.append(torch.autograd.grad(implicit(solution).z.sum(), c)[0])
    assert float(gradients[0].abs().min()) > 0.1
    assert torch.allclose(*gradients)


def test_a_solve_with_a_centre_that_requires_grad_returns_no_graph() -> None:
    for constraint in (LinfBall(centre(), 0.1), Intersection(L2Ball(centre(), 0.1), Box(-0.5, 0.3))):
        assert not any(block.requires_grad for block in solved(constraint).value)


def test_two_projections_are_differentiated_one_after_the_other() -> None:
    c = centre()
    both = Intersection(LinfBall(c, 0.1), Box(-0.05, 0.3))
    first, second = (torch.autograd.grad(both.project(FAR).sum(), c)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("ball", [L2Ball, LinfBall])
def test_a_changed_centre_is_seen(ball: type[L2Ball | LinfBall]) -> None:
    c = centre().detach()
    both = Intersection(ball(c, 0.5), Box(-1.0, 1.0))
    both.project(FAR)
    c += 0.3
    assert torch.equal(both.project(FAR), Intersection(ball(c.clone(), 0.5), Box(-1.0, 1.0)).project(FAR))
    c.data = c - 0.4
    assert torch.equal(both.project(FAR), Intersection(ball(c.clone(), 0.5), Box(-1.0, 1.0)).project(FAR))
    c += 9
    with pytest.raises(ValueError, match="do not meet"):
        both.project(FAR)


def test_one_projection_is_kept_for_each_form_of_x() -> None:
    c = centre().detach()
    both = Intersection(L2Ball(c, 0.5), Box(-1.0, 1.0))
    for _ in range(5):
        both.project(FAR)
        c += 0.01
    assert len(both._prepared) == 1


def test_what_inference_mode_prepared_does_not_meet_autograd() -> None:
    both = Intersection(L2Ball(centre().detach(), 0.5), Box(-1.0, 1.0))
    with torch.inference_mode():
        expected = both.project(FAR).clone()
        inside = Intersection(L2Ball(centre().detach().clone(), 0.5), Box(-1.0, 1.0))
        assert torch.equal(inside.project(FAR), expected)
    x = FAR.clone().requires_grad_()
    found = both.project(x)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


BALL = L2Ball(torch.zeros(1, 2), 1.0)
AROUND = {
    "ball": BALL,
    "ball and wide box": Intersection(BALL, Box(-0.9, 0.9)),
    "ball and half-space": Intersection(BALL, Box(0.0, torch.inf)),
}


@pytest.mark.parametrize("constraint", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("size", [1e3, 1e19, 1e20, 1e38])
def test_points_whose_squares_overflow_are_projected(constraint: Constraint, size: float) -> None:
    x = torch.tensor([[size, size / 2], [2.0, 1.0], [0.25, 0.5]], requires_grad=True)
    found = constraint.project(x)
    direction = torch.tensor([2.0, 1.0]) / 5**0.5
    assert torch.allclose(found[:2], direction.expand(2, 2), rtol=1e-6)
    assert torch.equal(found[2], x[2])
    (gradient,) = torch.autograd.grad(found[:, 1].sum(), x)
    # of 1 / |x| times the projection across x
    across = torch.tensor([-2.0, 4.0]) / 5
    assert torch.allclose(gradient[0] * (size * 1.25**0.5), across, rtol=1e-4)
    assert torch.allclose(gradient[1] * 5**0.5, across, rtol=1e-4)


def test_doubles_overflow_as_little() -> None:
    x = torch.tensor([[1e200, 5e199]], dtype=DOUBLE)
    for radius in (1.0, 1e150):
        found = L2Ball(torch.zeros(1, 2, dtype=DOUBLE), radius).project(x)
        assert torch.allclose(found / radius, torch.tensor([[2.0, 1.0]], dtype=DOUBLE) / 5**0.5)


def test_a_neighbour_that_overflows_does_not_change_a_bit() -> None:
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    for constraint in AROUND.values():
        alone = constraint.project(x)
        assert torch.equal(constraint.project(torch.cat([x, torch.full((1, 2), 1e25)]))[:4], alone)
