from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from jiio import Box, Problem, Step, solve, tree
from jiio.damped import Damped

D = 4


def rule(batch: int = 3) -> tuple[Damped, torch.Tensor, torch.Tensor]:
    """A rule with H and G behind it, (batch, D, D)."""
    draw = torch.Generator().manual_seed(0)
    root, other = torch.randn(2, batch, D, D, generator=draw, dtype=torch.float64)
    G, H = root @ root.mT + torch.eye(D), other @ other.mT
    half = torch.linalg.inv(torch.linalg.cholesky(G))
    values, vectors = torch.linalg.eigh(half @ H @ half.mT)
    one = torch.ones(batch, 1, dtype=torch.float64)
    return Damped(half.mT @ vectors, values, 0.5 * one, one), H, G


def test_the_direction_is_that_of_the_damped_matrix() -> None:
    damped, H, G = rule()
    gradient = torch.randn(3, D, dtype=torch.float64)
    expected = torch.linalg.solve(H + 0.5 * G, gradient)
    assert torch.allclose(damped.direction(gradient), expected)
    assert damped.direction(gradient.float()).dtype == torch.float32


def test_the_share_falls_where_z_and_mu_keep_up_and_rises_where_they_do_not() -> None:
    damped = rule()[0]
    z = x = torch.zeros(3, D)
    for k in range(40):
        damped = damped.refresh(z, x, k, torch.tensor([1e-4, Damped.TRUSTED, 1.0]))
    assert float(damped.share[0]) < 0.2
    assert float(damped.share[1]) == pytest.approx(1.0)
    assert float(damped.share[2]) == Damped.MOST


def test_a_sample_that_is_taken_out_takes_its_damping_along() -> None:
    damped = rule()[0]
    damped = damped.refresh(torch.zeros(3, D), torch.zeros(3, D), 0, torch.tensor([1e-3, 0.1, 1.0]))
    gradient, rows = torch.randn(3, D, dtype=torch.float64), torch.tensor([2, 0])
    assert torch.allclose(damped.select(rows).direction(gradient[rows]), damped.direction(gradient)[rows])
    shared = Damped(damped.vectors[:1], damped.values[:1], damped.damping[:1], damped.share)
    assert torch.allclose(shared.select(rows).direction(gradient[rows]), shared.direction(gradient)[rows])


def test_a_sample_that_is_taken_out_takes_its_rate_along() -> None:
    damped = replace(rule()[0], rate=torch.tensor([1.0, 0.5, 0.25]))
    assert torch.equal(torch.as_tensor(damped.select(torch.tensor([2, 0])).rate), torch.tensor([0.25, 1.0]))


def test_a_set_or_an_x_that_it_does_not_fit_is_refused() -> None:
    damped = rule()[0]
    problem = Problem(lambda z, x: 0.5 * z + x, lambda z, x: z.square().sum(1))
    start = problem.start(torch.ones(3, D, dtype=torch.float64), torch.zeros(3, D, dtype=torch.float64))
    with pytest.raises(ValueError, match="does not commute"):
        solve(replace(problem, constraint=Box(-1.0, 1.0)), start, step=Step(damped))
    with pytest.raises(ValueError, match="vectors"):
        solve(problem, tree.select(start, torch.tensor([0, 1])), step=Step(damped))
