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


def test_penalty_of_a_tree_is_that_of_its_flat_vector() -> None:
    A = torch.tensor([[0.3, -0.8, 0.1], [0.5, 0.2, 0.0], [0.0, 0.4, -0.6]], dtype=torch.float64)

    def f(z):
        moved = torch.cat([z[0], z[1][0]], dim=1) @ A.T
        return moved[:, :1], (moved[:, 1:],)

    z = (torch.zeros(2, 1, dtype=torch.float64), (torch.zeros(2, 2, dtype=torch.float64),))
    found = jacobian_penalty(f, z, probes=4000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(found, A.square().sum().expand(2) / 3, rtol=0.1)


def test_gradient_of_the_penalty_is_that_of_the_frobenius_norm() -> None:
    A = torch.tensor([[0.3, -0.8], [0.5, 0.2]], dtype=torch.float64, requires_grad=True)
    z = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    jacobian_penalty(lambda v: v @ A.T, z, probes=4000, generator=torch.Generator().manual_seed(0)).sum().backward()
    assert A.grad is not None and z.grad is None
    assert torch.allclose(A.grad, A.detach(), atol=0.05)  # d/dA |A|_F^2 / 2 entries


@pytest.mark.parametrize("method", [jacobian_penalty, spectral_radius])
def test_a_seed_repeats_the_estimate_and_no_graph_is_needed(method) -> None:
    cell, z, x, _ = setting()
    with torch.no_grad():
        a, b = (method(lambda v: cell.f(v, x), z, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and not a.requires_grad and a.shape == (3,)


def test_a_nilpotent_jacobian_has_radius_zero() -> None:
    A = torch.tensor([[0.0, 5.0], [0.0, 0.0]])
    assert float(spectral_radius(lambda z: z @ A.T, torch.zeros(1, 2))) < 1e-30


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"\[\(1, 2\)\] to \[\(1, 1\)\]"):
        jacobian_penalty(lambda z: z[:, :1], torch.zeros(1, 2))
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        jacobian_penalty(lambda z: z, torch.zeros(1, 1), probes=0)
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        spectral_radius(lambda z: z, torch.zeros(1, 1), steps=1)
