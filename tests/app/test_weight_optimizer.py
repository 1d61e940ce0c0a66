from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jiio.app.weight_optimizer import MATRIX_RATE, WeightOptimizer, orthogonal_factor


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_the_factor_is_that_of_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert float((orthogonal_factor(matrix) - u @ v).abs().max()) < 0.05  # softened for singular values near 0
    assert float((orthogonal_factor(1e-6 * matrix) - orthogonal_factor(matrix)).abs().max()) < 1e-4


def test_directions_without_a_gradient_stay() -> None:
    """Noise of a millionth must not move a weight as far as the gradient does."""
    matrix = torch.diag(torch.tensor([1.0, 1e-6]))
    assert torch.allclose(orthogonal_factor(matrix), torch.diag(torch.tensor([1.0, 1e-4])), atol=1e-4)
    assert bool((orthogonal_factor(torch.zeros(3, 2)) == 0).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_makes_the_weight_so_and_raises_nothing(value: float) -> None:
    spoiled, other = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2, 3))
    optimizer = WeightOptimizer([spoiled, other])
    spoiled.grad, other.grad = torch.full((3, 2), value), torch.ones(2, 3)
    optimizer.step(0.01)
    assert bool(spoiled.isnan().all()) and bool(other.isfinite().all())


def test_a_kernel_moves_equally_far_along_all_directions() -> None:
    kernel, bias = nn.Parameter(torch.zeros(4, 2, 3, 3)), nn.Parameter(torch.zeros(4))
    optimizer = WeightOptimizer([kernel, bias])
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(0))
    bias.grad = torch.tensor([1.0, -1.0, 2.0, 0.5])
    optimizer.step(0.01)
    moved = torch.linalg.svdvals(kernel.detach().flatten(1)) / (MATRIX_RATE * 0.01 * 18**0.5)
    assert float((moved - 1).abs().max()) < 1e-2
    assert torch.allclose(bias.detach(), -0.01 * bias.grad.sign())


def test_matrices_decay_in_parts_of_the_learning_rate_and_nothing_else_does() -> None:
    kernel, bias = nn.Parameter(torch.ones(4, 2, 3, 3)), nn.Parameter(torch.ones(4))
    optimizer = WeightOptimizer([kernel, bias], decay=3.0)
    kernel.grad, bias.grad = torch.zeros_like(kernel), torch.zeros_like(bias)
    optimizer.step(0.01)
    assert torch.allclose(kernel.detach(), torch.full_like(kernel, 0.97)) and bool((bias == 1).all())


def test_a_model_of_matrices_alone_or_of_none_is_trained_and_what_has_no_gradient_stays() -> None:
    for shape in ((3, 2), (3,)):
        moved, still = (nn.Parameter(torch.ones(shape)) for _ in range(2))
        optimizer = WeightOptimizer([moved, still])
        moved.grad = torch.ones(shape)
        optimizer.step(0.01)
        optimizer.load_state_dict(optimizer.state_dict())
        assert bool((moved < 1).all()) and bool((still == 1).all())


def test_a_saved_optimizer_goes_on_to_the_bit() -> None:
    def weights() -> list[nn.Parameter]:
        drawn = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(shape, generator=drawn)) for shape in ((6, 3), (6,), (2, 3, 3, 3))]

    def steps(parameters: list[nn.Parameter], optimizer: WeightOptimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            loss: Tensor = sum((weight.square() * weight).sum() for weight in parameters)  # type: ignore[assignment]
            loss.backward()
            optimizer.step(1e-2)

    whole, first = weights(), weights()
    steps(whole, WeightOptimizer(whole), 6)
    left = WeightOptimizer(first)
    steps(first, left, 2)
    taken_up = WeightOptimizer(first)
    taken_up.load_state_dict(left.state_dict())
    steps(first, taken_up, 4)
    assert all(bool((a == b).all()) for a, b in zip(whole, first, strict=True))
