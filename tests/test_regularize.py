from __future__ import annotations

import pytest
import torch

from jiio import jacobian_penalty, spectral_radius
from tests.problems import D, N, SmoothCell


def setting():
    cell = SmoothCell()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, N, dtype=torch.float64, generator=generator)
    x = torch.randn(3, D, dtype=torch.float64, generator=generator)
    jacobians = torch.stack(
        [torch.autograd.functional.jacobian(lambda v, i=i: cell.f(v[None], x[i : i + 1])[0], z[i]) for i in range(3)]
    )
    return cell, z, x, jacobians


def test_penalty_estimates_the_frobenius_norm() -> None:
    cell, z, x, jacobians = setting()
    found = jacobian_penalty(lambda v: cell.f(v, x), z, probes=4000, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(found, jacobians.square().sum((1, 2)) / N, rtol=0.1)


def test_penalty_has_a_gradient_in_the_parameters_at_fixed_z() -> None:
    cell, z, x, _ = setting()
    jacobian_penalty(lambda v: cell.f(v, x), z).sum().backward()
    assert cell.W.grad is not None
    assert float(cell.W.grad.abs().max()) > 0


def test_spectral_radius_is_that_of_the_dense_jacobian() -> None:
    cell, z, x, jacobians = setting()
    found = spectral_radius(lambda v: cell.f(v, x), z, steps=400, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(found, torch.linalg.eigvals(jacobians).abs().amax(1), rtol=0.05)


def test_a_tree_is_measured_like_its_flat_vector() -> None:
    A = torch.tensor([[0.0, -0.8], [0.8, 0.0]], dtype=torch.float64)

    def f(z):
        moved = torch.cat(z, dim=1) @ A.T
        return moved[:, :1], moved[:, 1:]

    z = (torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    assert spectral_radius(f, z).tolist() == pytest.approx([0.8])


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        jacobian_penalty(lambda z: z, torch.zeros(1, 1), probes=0)
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        spectral_radius(lambda z: z, torch.zeros(1, 1), steps=1)
