"""The classifier: bounded gain, the exact gradient, JSON round trip, refusals."""

from __future__ import annotations

import json

import pytest
import torch

from jiio.models import ClassifierConfig, ImageInjection, classifier


@pytest.mark.parametrize("cell", ["well_posed", "mdeq"])
def test_logits_have_a_row_for_each_image(cell) -> None:
    torch.manual_seed(0)
    model = classifier(ClassifierConfig(image_shape=(3, 16, 16), classes=5, channels=(8, 16), cell=cell))
    model.on_failure = "ignore"
    assert model(torch.rand(3, 3, 16, 16)).shape == (3, 5)


def test_the_gain_in_x_stays_below_its_bound_under_optimiser_drift() -> None:
    torch.manual_seed(0)
    u = ImageInjection((1, 8, 8), [(6, 8, 8), (8, 4, 4)], patch=1, limit=3.0)
    optimizer = torch.optim.Adam(u.parameters(), lr=0.1)
    for _ in range(20):
        x = torch.rand(8, 1, 8, 8)
        optimizer.zero_grad()
        (-sum(part.square().sum() for part in u.bind()(x))).backward()  # pyright: ignore
        optimizer.step()
    bound = u.bind()
    with torch.no_grad():
        for _ in range(20):
            a = torch.randn(1, 1, 8, 8)
            b = a + 1e-2 * torch.randn_like(a)
            moved = sum(float((p - q).square().sum()) for p, q in zip(bound(a), bound(b), strict=True)) ** 0.5
            assert moved <= u.gain * float((a - b).norm())


def test_the_gradient_in_x_agrees_with_differences() -> None:
    torch.manual_seed(0)
    model = classifier(ClassifierConfig(image_shape=(1, 8, 8), classes=3, channels=(4, 6), patch=2)).double()
    model.tol = 1e-11
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((model(x) * weight).sum(), x)
    direction, eps = torch.randn_like(x), 1e-5
    with torch.no_grad():
        slope = ((model(x + eps * direction) - model(x - eps * direction)) * weight).sum() / (2 * eps)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-6)


def test_a_configuration_survives_json() -> None:
    config = ClassifierConfig(image_shape=(3, 32, 32), channels=(8, 16, 32))
    assert ClassifierConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        ClassifierConfig(image_shape=(1, 9, 9))
    with pytest.raises(ValueError, match="classes"):
        ClassifierConfig(classes=1)
    with pytest.raises(ValueError, match="limit"):
        ImageInjection((1, 8, 8), [(4, 4, 4)], limit=0.0)
    for shapes in ([(4, 8, 8)], [(4, 4, 2)], [(4, 4, 4), (6, 4, 4)], [(4, 4, 4), (6, 2, 2), (8, 1, 1), (8, 0, 0)]):
        with pytest.raises(ValueError, match=r"scale \d of z, .*must have the sides of the image \(1, 8, 8\) over"):
            ImageInjection((1, 8, 8), shapes)
    with pytest.raises(ValueError, match="patch"):
        ImageInjection((1, 8, 8), [(4, 8, 8)], patch=0)
