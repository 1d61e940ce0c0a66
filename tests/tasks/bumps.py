"""A tiny generator of smooth bumps, for tests of what is done with generators."""

from __future__ import annotations

import torch

from jiio.models import Generator, GeneratorConfig, generator
from jiio.tasks.latent_fit import fit_latents


def tiny(dtype: torch.dtype = torch.float32) -> Generator:
    torch.manual_seed(0)
    config = GeneratorConfig(image_shape=(1, 8, 8), latent=4, channels=(4, 8), patch=1)
    return generator(config).to(dtype)


def images(count: int = 6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Smooth bumps."""
    generator = torch.Generator().manual_seed(1)
    grid = torch.linspace(-1, 1, 8)
    centre = torch.rand(count, 2, 1, 1, generator=generator) - 0.5
    squares = (grid[:, None] - centre[:, :1]) ** 2 + (grid - centre[:, 1:]) ** 2
    return torch.exp(-4 * squares).to(dtype)


def fitted(dtype: torch.dtype = torch.float32) -> Generator:
    model = tiny(dtype)
    fit_latents(model, images(32, dtype))
    return model
