"""Generators on either cell."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from jiio.models import Generator, GeneratorConfig, generator
from jiio.models.generator import MARGIN

SMALL = GeneratorConfig(image_shape=(1, 8, 8), latent=6, channels=(8, 16))


def render(model: Generator, x: torch.Tensor, steps: int = 40) -> torch.Tensor:
    f, z = model.cell(), model.start(x)
    for _ in range(steps):
        z = f(z, x)
    return model.readout(z)


@pytest.mark.parametrize("cell", ["well_posed", "mdeq"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 12), (1, 28, 28)])
def test_images_have_the_shape_asked_for_and_lie_within_the_margin_of_the_unit_interval(
    cell: str, shape: tuple[int, int, int]
) -> None:
    config = GeneratorConfig(image_shape=shape, latent=6, channels=(8, 16), cell=cell)  # type: ignore[arg-type]
    images = render(generator(config), torch.randn(2, 6), steps=2)
    assert images.shape == (2, *shape)
    assert images.min() >= -MARGIN and images.max() <= 1 + MARGIN


def test_a_generator_is_rebuilt_from_json_and_its_weights() -> None:
    config = GeneratorConfig(image_shape=(3, 16, 16), latent=6, channels=(8, 16), driven=(1,), activation="softplus")
    model = generator(config)
    copy = generator(GeneratorConfig.from_dict(json.loads(json.dumps(config.to_dict()))))
    copy.load_state_dict(model.state_dict())
    x = torch.randn(2, 6)
    assert copy.config == config
    assert torch.equal(render(model, x), render(copy, x))


def test_a_side_that_does_not_divide_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"image of 30x28 does not divide by 4.*resize or pad"):
        GeneratorConfig(image_shape=(1, 30, 28))


def test_unknown_cells_and_wrong_gains_are_refused() -> None:
    with pytest.raises(ValueError, match="'well_posed' or 'mdeq', got 'transformer'"):
        GeneratorConfig(cell="transformer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="readout_gain must be positive"):
        GeneratorConfig(readout_gain=0.0)


def test_gain_from_latent_to_image_is_bounded_after_adversarial_steps() -> None:
    model = generator(SMALL).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    x = torch.randn(8, 6, dtype=torch.float64)
    for _ in range(30):
        optimizer.zero_grad()
        (-render(model, x, steps=8).var(0).sum()).backward()
        optimizer.step()
    jacobian = torch.func.jacrev(lambda one: render(model, one[None])[0].flatten())(x[0])
    config = model.config
    # gain in x, resolvent of a contraction, readout and the slope of its sigmoid
    bound = model.equilibrium.injection.gain / (1 - config.contraction) * config.readout_gain / 4
    assert torch.linalg.matrix_norm(jacobian, ord=2) <= bound


def test_gradients_reach_every_parameter() -> None:
    model = generator(SMALL)
    render(model, torch.randn(4, 6)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in model.parameters())


def test_calibration_makes_the_mean_image_the_start() -> None:
    model, images = generator(SMALL), torch.rand(50, 1, 8, 8)
    model.calibrate(images)
    blank = tuple(torch.zeros_like(part) for part in model.start(torch.zeros(1, 6)))
    assert torch.allclose(model.readout(blank)[0], images.mean(0), atol=1e-5)


@pytest.mark.parametrize("cell", ["well_posed", "mdeq"])
def test_samples_do_not_depend_on_their_neighbours(cell: str) -> None:
    config = GeneratorConfig(image_shape=(1, 8, 8), latent=6, channels=(8, 16), cell=cell)  # type: ignore[arg-type]
    model, x = generator(config).double(), torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(render(model, x, steps=5)[2:3], render(model, x[2:3], steps=5), atol=1e-12)


@pytest.mark.parametrize("cell", ["well_posed", "mdeq"])
def test_train_and_eval_agree_and_there_is_no_batch_norm(cell: str) -> None:
    config = GeneratorConfig(image_shape=(1, 8, 8), latent=6, channels=(8, 16), cell=cell)  # type: ignore[arg-type]
    model, x = generator(config), torch.randn(2, 6)
    assert torch.equal(render(model.train(), x, steps=3), render(model.eval(), x, steps=3))
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())
