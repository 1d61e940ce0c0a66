"""`jiio sample`: images drawn from a generator's density of latents, and test images reconstructed, mixed and added."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from jiio.app.figure import image_grid
from jiio.models import Generator
from jiio.tasks.density import LatentDensity
from jiio.tasks.generation import PRIOR, reconstruct
from jiio.tasks.latent_model import density, solve_equilibrium
from jiio.tasks.metrics import each_psnr

COLUMNS = 10
WAYS = 4  # of an interpolation, each from one test image to another
PAIRS = 2  # rows of images, each with its reconstructions below
Kind = Literal["mixture", "gaussian", "prior"]


def sample(
    model: Generator,
    test: Tensor,
    *,
    rows: int,
    seed: int,
    output: Path,
    kind: Kind = "mixture",
    prior: float = PRIOR,
) -> dict[str, Any]:
    """Write samples.png, `rows` of ten images drawn from the density `kind`, and of test images chosen by `seed`
    reconstructions.png, interpolation.png and arithmetic.png."""
    generator = torch.Generator().manual_seed(seed)
    source = density_of(model, kind)
    drawn = source.sample(rows * COLUMNS, generator)
    grid = [("", row, None) for row in decode(model, drawn).split(COLUMNS)]
    pictures = [image_grid(grid, output / "samples.png")]
    order = torch.randperm(len(test), generator=generator)
    chosen = test[order[torch.arange(3 * COLUMNS) % len(order)]].to(drawn.device)
    found, solution = reconstruct(model, chosen, prior=prior, on_failure="ignore")
    x = solution.value.x
    pictures += [
        reconstructions(chosen.cpu(), found.cpu(), output / "reconstructions.png"),
        interpolation(model, x[: 2 * WAYS], output / "interpolation.png"),
        arithmetic(model, chosen.cpu(), x, output / "arithmetic.png"),
    ]
    return {
        "pictures": [str(picture) for picture in pictures],
        "samples": len(drawn),
        "energy": float(source.energy(drawn).mean()),
        "converged": float(solution.converged.float().mean()),
    }


def density_of(model: Generator, kind: Kind) -> LatentDensity:
    """The mixture fitted to the latents, the one Gaussian of its mean and covariance, or N(0, 1)."""
    fitted = density(model)
    if kind == "prior":
        return LatentDensity.standard(fitted.center())
    return fitted if kind == "mixture" else fitted.gaussian()


def reconstructions(images: Tensor, found: Tensor, path: Path) -> Path:
    """Test images, and below each what the latent found for it gives, with its PSNR."""
    rows = []
    for truth, fitted in list(zip(images.split(COLUMNS), found.split(COLUMNS), strict=True))[:PAIRS]:
        captions = [f"{value:.1f} dB" for value in each_psnr(fitted, truth)]
        rows += [("test image", truth, None), ("reconstruction", fitted, captions)]
    return image_grid(rows, path)


def interpolation(model: Generator, x: Tensor, path: Path) -> Path:
    """Straight ways from the first half of the latents to the second."""
    first, last = x.chunk(2)
    shares = torch.linspace(0, 1, COLUMNS).to(x)
    between = torch.lerp(first[:, None], last[:, None], shares[:, None])
    pictures = decode(model, between.flatten(0, 1)).unflatten(0, (len(first), COLUMNS))
    return image_grid([("", row, None) for row in pictures], path)


def arithmetic(model: Generator, images: Tensor, x: Tensor, path: Path) -> Path:
    """Images a, b, c, thirds of `images` with latents `x`, and what a - b + c of their latents gives, in columns."""
    rows = [(label, part, None) for label, part in zip("abc", images.chunk(3), strict=True)]
    return image_grid([*rows, ("a - b + c", added(model, x), None)], path)


def added(model: Generator, x: Tensor) -> Tensor:
    """The images of a - b + c, thirds of the latents `x`."""
    a, b, c = x.chunk(3)
    return decode(model, a - b + c)


def decode(model: Generator, latents: Tensor) -> Tensor:
    """The images of latents, on the CPU."""
    with torch.no_grad():
        return model.readout(solve_equilibrium(model, latents)).clamp(0, 1).cpu()
