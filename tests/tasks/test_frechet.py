from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from jiio import load
from jiio.data import load_images
from jiio.models import Classifier
from jiio.tasks.frechet import features_of, frechet_distance, pooled_features, symmetric_root


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_moments(count: int, mean: torch.Tensor, covariance: torch.Tensor, seed: int) -> torch.Tensor:
    """Features of exactly this mean and covariance."""
    raw = random(count, len(mean), seed=seed)
    raw = raw - raw.mean(0)
    own = torch.linalg.cholesky(raw.T @ raw / (count - 1))
    white = torch.linalg.solve_triangular(own, raw.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ white).T + mean


def test_the_distance_is_the_closed_form_where_covariances_commute() -> None:
    """Covariances Q diag(a) Q^T and Q diag(b) Q^T: |m - m'|^2 + sum (sqrt a - sqrt b)^2."""
    Q = torch.linalg.qr(random(5, 5)).Q
    a, b = torch.tensor([4.0, 1.0, 0.25, 9.0, 1e-4]).double(), torch.tensor([1.0, 1.0, 2.25, 0.04, 4.0]).double()
    m, n = random(5, seed=1), random(5, seed=2)
    first = with_moments(40, m, (Q * a) @ Q.T, seed=3)
    second = with_moments(60, n, (Q * b) @ Q.T, seed=4)
    expected = float((m - n).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)


def test_the_distance_is_scipys_for_any_covariances() -> None:
    first, second = random(50, 6) @ random(6, 6, seed=1), random(40, 6, seed=2) @ random(6, 6, seed=3) + 1
    A, B = np.cov(first.numpy(), rowvar=False), np.cov(second.numpy(), rowvar=False)
    spread = np.trace(A + B - 2 * np.real(sqrtm(A @ B)))
    expected = float((first.mean(0) - second.mean(0)).square().sum()) + spread
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)


def test_fewer_images_than_features_are_no_trouble() -> None:
    """Singular covariances: equal sets have distance 0, and a shift is its square."""
    few = random(4, 12)
    assert frechet_distance(few, few) < 1e-12
    assert frechet_distance(few.float(), few.float() + 0.5) == pytest.approx(3.0, rel=1e-5)


def test_the_root_squares_to_the_matrix_and_is_symmetric() -> None:
    half = random(7, 4)
    matrix = half @ half.T
    root = symmetric_root(matrix)
    assert torch.allclose(root @ root, matrix, atol=1e-12)
    assert torch.allclose(root, root.T, atol=1e-14)
    full = matrix + torch.eye(7, dtype=torch.float64)
    assert np.allclose(symmetric_root(full).numpy(), np.real(sqrtm(full.numpy())), atol=1e-10)


def test_features_of_the_packaged_classifier_tell_noise_from_digits() -> None:
    model = load("digits-classifier")
    assert isinstance(model, Classifier)
    extract = pooled_features(model)
    digits = load_images("digits", "test")[:260]
    real = features_of(extract, digits)
    assert real.shape == (260, sum(model.config.channels))
    with torch.no_grad():
        coarse = model.solve(digits[:3]).value[-1]
    assert torch.allclose(real[:3, -coarse.shape[1] :], coarse.mean((2, 3)), atol=1e-4)
    halves = frechet_distance(real[::2], real[1::2])
    noise = digits + 0.2 * torch.randn(digits.shape, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features_of(extract, noise.clamp(0, 1)), real) > 2 * halves


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"two images or more, got \(1, 3\)"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="the same features, got 3 and 4"):
        frechet_distance(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(torch.tensor([[0.0], [float("nan")]]), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"must return \(4, features\) for 4 images, got \(4, 1, 2, 2\)"):
        features_of(lambda images: images, torch.zeros(4, 1, 2, 2))
