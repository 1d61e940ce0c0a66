from __future__ import annotations

import math

import pytest
import torch

from jiio.tasks.measurement import Downsample, GaussianBlur, Hole, Identity, Mask, PixelMask, damage, measure

OPERATORS = {
    "identity": Identity(),
    "hole": Hole(),
    "pixels": PixelMask(0.4),
    "mask": Mask(torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(3)).round()),
    "blur": GaussianBlur(0.8),
    "downsample": Downsample(2),
}
EACH = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


def images(batch: int = 5, channels: int = 3) -> torch.Tensor:
    return torch.rand(batch, channels, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@EACH
def test_adjoint_is_the_adjoint(operator) -> None:
    x = images()
    measurement = measure(operator, x)
    y = torch.randn(measurement.y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    left = (operator.apply(x, *measurement.parameters) * y).sum()
    right = (x * operator.adjoint(y, *measurement.parameters)).sum()
    assert float((left - right).abs()) < 1e-9


@EACH
def test_damage_of_a_sample_does_not_depend_on_its_batch(operator) -> None:
    together = measure(operator, images(), sigma=0.1, seed=4)
    alone = measure(operator, images()[3:4], sigma=0.1, ids=[3], seed=4)
    assert torch.equal(together.y[3:4], alone.y)
    assert not torch.equal(together.y[3:4], measure(operator, images()[3:4], sigma=0.1, ids=[3], seed=5).y)
    assert bool(measure(operator, images(), seed=2**62).y.isfinite().all())  # the generator takes no more than 64 bits


@EACH
def test_operators_are_differentiable(operator) -> None:
    x = images().requires_grad_()
    measurement = measure(operator, x.detach())
    operator.apply(x, *measurement.parameters).square().sum().backward()
    assert x.grad is not None


def test_a_hole_takes_a_tenth_of_the_area() -> None:
    mask = measure(Hole(), torch.ones(3, 1, 28, 28)).parameters[0]
    assert mask.shape == (3, 1, 28, 28)
    assert (1 - mask).flatten(1).sum(1).tolist() == [81.0] * 3
    face = 1 - measure(Hole(), torch.ones(2, 3, 64, 64)).parameters[0]
    assert [(int(one.any(1).sum()), int(one.any(0).sum())) for one in face[:, 0]] == [(20, 20)] * 2
    assert face.flatten(1).sum(1).tolist() == [400.0] * 2


def test_noise_has_the_sigma_asked_for_and_none_where_nothing_is_measured() -> None:
    clean = torch.zeros(50, 1, 16, 16)
    assert float(measure(Identity(), clean, sigma=0.2).y.std()) == pytest.approx(0.2, rel=0.03)
    holed = measure(Hole(), clean, sigma=0.2)
    assert float(holed.y[holed.parameters[0] == 0].abs().max()) == 0
    soft = measure(Mask(torch.full((1, 16, 16), 0.5)), clean, sigma=0.2)
    assert float(soft.y.std()) == pytest.approx(0.2, rel=0.03)


def test_select_takes_rows_of_everything() -> None:
    whole = measure(Hole(), images())
    part = whole.select(torch.tensor([1, 4]))
    assert torch.equal(part.y, whole.y[[1, 4]])
    assert torch.equal(part.parameters[0], whole.parameters[0][[1, 4]])


def test_damages_have_names() -> None:
    assert damage("hole") == (Hole(), 0.0)
    assert damage("noise-0.2") == (Identity(), 0.1)
    assert damage("pixels") == (PixelMask(0.5), 0.0)
    assert damage("blur") == (GaussianBlur(1.0), 0.0)
    assert damage("downsample") == (Downsample(2), 0.0)
    assert damage("superresolution") == (Downsample(4), 0.0)
    with pytest.raises(ValueError, match="unknown damage 'rain': choose one of hole, pixels"):
        damage("rain")


def test_bad_input_is_named() -> None:
    for call, message in [
        (lambda: measure(Hole(9), images()), "hole of side 9 does not fit an image of 8x8"),
        (lambda: measure(Downsample(3), images()), "8x8 does not divide by the factor 3"),
        (lambda: measure(Mask(torch.ones(1, 4, 4)), images()), r"mask has shape \(1, 4, 4\).*\(1, 8, 8\)"),
        (lambda: measure(Identity(), images(), sigma=-1), "sigma must be finite and not negative, got -1"),
        (lambda: measure(Identity(), images(), sigma=math.nan), "sigma must be finite and not negative, got nan"),
        (lambda: measure(Identity(), images(), ids=[1]), "5 images need as many ids, got 1"),
        (lambda: PixelMask(0.0), r"keep must lie in \(0, 1\], got 0.0"),
        (lambda: GaussianBlur(0.0), "must be positive, got 0.0"),
        (lambda: Downsample(0), "at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
