"""Physics objects of deepinv as measurement operators; what needs deepinv is skipped where it is not installed."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jiio.tasks.measurement import Downsample, GaussianBlur, Hole, Identity, Mask, measure
from jiio.tasks.physics import PhysicsOperator, from_physics, measured_by
from jiio.tasks.ppca import PPCA
from jiio.tasks.restoration import restore
from tests.tasks.test_generation import fitted, images

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def physics(torchvision: None) -> Any:
    """deepinv.physics."""
    if importlib.util.find_spec("deepinv") is None:
        pytest.skip("deepinv is not installed: pip install 'jiio[inverse]'")
    return importlib.import_module("deepinv.physics")


def window(sigma: float) -> torch.Tensor:
    """The kernel of `GaussianBlur`, (1, 1, side, side)."""
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1).float()
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    return (kernel[:, None] * kernel)[None, None]


def test_blur_and_downsampling_agree_with_deepinv_where_the_definitions_coincide(physics: Any) -> None:
    x = images()
    blur = physics.Blur(filter=window(0.8), padding="constant")
    assert torch.allclose(blur.A(x), GaussianBlur(0.8).apply(x), atol=1e-6)
    means = physics.Downsampling(img_size=SHAPE, factor=2, filter=torch.full((1, 1, 2, 2), 0.25), padding="valid")
    assert torch.allclose(means.A(x), Downsample(2).apply(x), atol=1e-6)
    y = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(means.A_adjoint(y), Downsample(2).adjoint(y), atol=1e-6)


def test_inpainting_is_a_mask_and_denoising_the_identity(physics: Any) -> None:
    mask = measure(Hole(), images()[:1]).parameters[0][0]
    operator, sigma = from_physics(physics.Inpainting(img_size=SHAPE, mask=mask), SHAPE)
    assert isinstance(operator, Mask) and torch.equal(operator.mask, mask) and sigma == 0
    denoising = physics.Denoising(physics.GaussianNoise(sigma=0.1))
    assert from_physics(denoising, SHAPE) == (Identity(), pytest.approx(0.1))
    with pytest.raises(ValueError, match="the noise must be Gaussian, got PoissonNoise"):
        from_physics(physics.Denoising(physics.PoissonNoise()), SHAPE)


def make(physics: Any, name: str) -> Any:
    noise = physics.GaussianNoise(sigma=0.02)
    if name == "inpainting":
        return physics.Inpainting(img_size=SHAPE, mask=0.6, noise_model=noise)
    if name == "denoising":
        return physics.Denoising(noise)
    if name == "downsampling":
        return physics.Downsampling(img_size=SHAPE, factor=2, filter="bilinear", noise_model=noise)
    kind = physics.Blur if name == "blur" else physics.BlurFFT
    sizes = {} if name == "blur" else {"img_size": SHAPE}
    return kind(filter=window(0.8), noise_model=noise, **sizes)


@pytest.mark.parametrize("name", ["inpainting", "denoising", "blur", "blur_fft", "downsampling"])
def test_what_a_physics_object_measured_is_restored(physics: Any, name: str) -> None:
    model = fitted()
    torch.manual_seed(0)
    made = make(physics, name)
    with torch.no_grad():
        measurement = measured_by(made, made(images()), SHAPE)
    assert measurement.sigma == pytest.approx(0.02)
    restored, solution = restore(model, measurement)
    assert bool(solution.converged.all())
    with torch.no_grad():
        seen = made.A(restored)
    other = measurement.y.roll(1, 0)
    assert float((seen - measurement.y).square().mean()) < float((seen - other).square().mean())
    in_range, posterior = PPCA.fit(images(60), 3).restore(measurement)
    assert in_range.shape == posterior.shape == restored.shape


def test_restoration_through_deepinv_is_that_of_our_own_operator(physics: Any) -> None:
    model, x = fitted(torch.float64), images(dtype=torch.float64)
    own = measure(GaussianBlur(0.8), x, sigma=0.02)
    made = physics.Blur(filter=window(0.8), padding="constant", noise_model=physics.GaussianNoise(sigma=0.02)).double()
    theirs, _ = restore(model, measured_by(made, own.y, SHAPE))
    ours, _ = restore(model, own)
    assert torch.allclose(theirs, ours, atol=1e-4)


def plain(A: Any, adjoint: Any = None) -> Any:
    """A physics object of two functions."""
    return SimpleNamespace(A=A, A_adjoint=adjoint or A, buffers=lambda: iter(()))


def test_any_object_with_a_and_its_adjoint_will_do() -> None:
    operator, sigma = from_physics(plain(lambda x: 2 * x.flip(3), lambda y: 2 * y.flip(3)), SHAPE)
    assert isinstance(operator, PhysicsOperator) and sigma == 0
    _, solution = restore(fitted(), measure(operator, images(), sigma=0.01))
    assert bool(solution.converged.all())


def test_objects_that_do_not_fit_are_refused() -> None:
    mask = torch.rand(3, 1, 8, 8).round()
    for made, message in [
        (plain(torch.square), "is not linear"),
        (plain(lambda x: x.flip(3), lambda y: y), "is not the adjoint"),
        (plain(lambda x: x.cfloat()), "must give a real measurement"),
        (plain(lambda x: x * mask[: len(x)]), "every sample in its own way"),
        (plain(lambda x: x @ torch.ones(4, 4)), r"does not measure images of shape \(1, 8, 8\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            from_physics(made, SHAPE)
