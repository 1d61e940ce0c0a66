"""The equilibrium encoder and the autoencoder built on it."""

from __future__ import annotations

import json

import pytest
import torch

from jiio.models import ClassifierConfig, VAEConfig, encoder, vae

SMALL = ClassifierConfig(image_shape=(1, 8, 8), classes=6, channels=(4, 6), patch=1)


@pytest.mark.parametrize("cell", ["well_posed", "mdeq"])
def test_mean_and_log_variance_have_a_row_for_each_image(cell) -> None:
    torch.manual_seed(0)
    model = encoder(ClassifierConfig(image_shape=(3, 16, 16), classes=10, channels=(8, 16), cell=cell))
    model.network.on_failure = "ignore"
    mean, log_variance = model(torch.rand(4, 3, 16, 16))
    assert mean.shape == log_variance.shape == (4, 5)


def test_the_gradient_in_the_weights_agrees_with_differences() -> None:
    torch.manual_seed(0)
    model = encoder(SMALL).double()
    model.network.tol = 1e-11
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    weight = model.network.equilibrium.injection.stem  # pyright: ignore[reportAttributeAccessIssue]
    direction, eps = torch.randn_like(weight), 1e-5

    def value() -> torch.Tensor:
        mean, log_variance = model(images)
        return (mean.sin() + log_variance.exp()).sum()

    (gradient,) = torch.autograd.grad(value(), weight)
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            weight.add_(sign * eps * direction)
            values.append(float(value()))
    assert float((gradient * direction).sum()) == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-6)


def test_codes_of_images_do_not_depend_on_their_batch() -> None:
    torch.manual_seed(0)
    model, images = encoder(SMALL).double(), torch.rand(4, 1, 8, 8, dtype=torch.float64)
    model.network.tol = 1e-13
    with torch.no_grad():
        together, alone = model(images), model(images[1:2])
    assert all(torch.allclose(a[1:2], b, atol=1e-10) for a, b in zip(together, alone, strict=True))


def test_configurations_survive_json() -> None:
    config = VAEConfig(image_shape=(3, 32, 32), channels=(8, 16, 32), encoder_channels=(8, 16))
    again = VAEConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.encoder.channels == (8, 16) and again.encoder.classes == 2 * again.latent


def test_an_autoencoder_is_rebuilt_from_json_and_its_weights() -> None:
    config = VAEConfig(image_shape=(1, 8, 8), latent=3, channels=(4, 8), encoder_channels=(4, 6), patch=1)
    model = vae(config)
    model.pixel_variance.fill_(0.1)
    copy = vae(VAEConfig.from_dict(json.loads(json.dumps(config.to_dict()))))
    copy.load_state_dict(model.state_dict())
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(copy.encoder(images)[0], model.encoder(images)[0])
    assert float(copy.pixel_variance) == pytest.approx(0.1)


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="latent of at least 1"):
        VAEConfig(latent=0)
    with pytest.raises(ValueError, match="two outputs for each entry"):
        encoder(ClassifierConfig(classes=3))
    with pytest.raises(ValueError, match="does not divide"):
        _ = VAEConfig(image_shape=(1, 16, 16), encoder_channels=(4, 8, 16, 32, 64)).encoder
