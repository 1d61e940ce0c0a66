"""Certified bounds on the norms of convolutions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jiio.models import convolution_norm


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_norm(weight: Tensor, side: int) -> float:
    """Spectral norm of the zero-padded convolution on side x side maps, as a dense matrix."""
    basis = torch.eye(weight.shape[1] * side * side, dtype=weight.dtype).view(-1, weight.shape[1], side, side)
    matrix = F.conv2d(basis, weight, padding=weight.shape[-1] // 2).flatten(1)
    return float(torch.linalg.matrix_norm(matrix, ord=2))


@pytest.mark.parametrize("shape", [(3, 3), (2, 5), (5, 2), (1, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_bound_is_above_the_true_norm_on_every_map_size(shape: tuple[int, int], seed: int) -> None:
    weight = draw(*shape, 3, 3, seed=seed)
    bound = float(convolution_norm(weight))
    assert all(dense_norm(weight, side) <= bound for side in (1, 2, 3, 7))


@pytest.mark.parametrize("channels", [4, 32])
def test_bound_is_within_a_quarter_of_the_norm_on_large_maps(channels: int) -> None:
    weight = draw(channels, channels, 3, 3)
    symbol = torch.fft.fft2(weight, s=(64, 64)).permute(2, 3, 0, 1)
    norm = float(torch.linalg.matrix_norm(symbol, ord=2).max())
    assert norm <= float(convolution_norm(weight)) <= 1.25 * norm


def test_worst_case_between_the_grid_points_is_covered() -> None:
    # a symbol of cos(w - pi / 8) on each axis peaks exactly between two of eight grid points
    shift = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.complex128)
    taps = torch.exp(1j * math.pi / 8 * shift) * torch.tensor([0.5, 0.0, 0.5])
    rotate = torch.stack((torch.stack((taps.real, -taps.imag)), torch.stack((taps.imag, taps.real))))
    weight = rotate[:, :, None, :]
    norm = float(torch.linalg.matrix_norm(torch.fft.fft(weight[:, :, 0], n=256).permute(2, 0, 1), ord=2).max())
    assert norm == pytest.approx(1.0, abs=1e-6)
    assert norm <= float(convolution_norm(weight)) <= 1.25


def test_gradient_matches_finite_differences() -> None:
    weight = draw(3, 2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(convolution_norm, (weight,))


def test_bound_scales_with_the_weight_without_overflow() -> None:
    weight = draw(4, 4, 3, 3).float()
    one = float(convolution_norm(weight))
    assert float(convolution_norm(1e12 * weight)) == pytest.approx(1e12 * one, rel=1e-4)
    assert float(convolution_norm(1e-12 * weight)) == pytest.approx(1e-12 * one, rel=1e-4)


def test_a_weight_of_zero_has_a_finite_bound() -> None:
    assert float(convolution_norm(torch.zeros(2, 2, 3, 3))) < 1e-2


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        convolution_norm(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="frequencies"):
        convolution_norm(torch.zeros(2, 2, 3, 3), frequencies=2)
