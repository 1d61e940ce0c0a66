"""`jiio sample`: images drawn from a generator's density of latents, and ways from one image to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jiio.app.figure import image_grid
from jiio.models import Generator
from jiio.tasks.generation import reconstruct
from jiio.tasks.latent_model import density, solve_equilibrium

COLUMNS = 10
WAYS = 4  # of an interpolation, each from one test image to another


def sample(model: Generator, test: Tensor, *, rows: int, seed: int, output: Path) -> dict[str, Any]:
    """Write samples.png, `rows` of ten drawn images, and interpolation.png, whose ends are reconstructions of `test`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = density(model).sample(rows * COLUMNS, generator)
    images = decode(model, drawn)
    samples = image_grid([("", row, None) for row in images.split(COLUMNS)], output / "samples.png")
    chosen = test[torch.randperm(len(test), generator=generator)[: 2 * WAYS]].to(drawn.device)
    _, solution = reconstruct(model, chosen, on_failure="ignore")
    first, last = solution.value.x.chunk(2)
    shares = torch.linspace(0, 1, COLUMNS).to(first)
    between = torch.lerp(first[:, None], last[:, None], shares[:, None])
    pictures = decode(model, between.flatten(0, 1)).unflatten(0, (len(first), COLUMNS))
    ways = image_grid([("", row, None) for row in pictures], output / "interpolation.png")
    energy = density(model).energy(drawn)
    return {
        "pictures": [str(samples), str(ways)],
        "samples": len(drawn),
        "energy": float(energy.mean()),
        "converged": float(solution.converged.float().mean()),
    }


def decode(model: Generator, latents: Tensor) -> Tensor:
    """The images of latents, on the CPU."""
    with torch.no_grad():
        return model.readout(solve_equilibrium(model, latents)).clamp(0, 1).cpu()
