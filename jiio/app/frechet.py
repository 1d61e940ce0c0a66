"""Frechet distances of a generator's samples and reconstructions, in `jiio evaluate RUN`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jiio.app.features import Features
from jiio.app.run_folder import user_input
from jiio.app.sample import decode
from jiio.app.table import show
from jiio.models import Generator
from jiio.tasks.frechet import BATCH, features_of, frechet_distance
from jiio.tasks.latent_model import density

LEAST = 4  # images: a covariance needs two, and the control halves them


def frechet_figures(
    model: Generator, features: Features, test: Tensor, reconstructed: Tensor, *, seed: int
) -> dict[str, Any]:
    """Distances from `test` to as many samples and to their reconstructions, and between two halves of `test`, which says
    what sampling alone gives (from half as many images: too much rather than too little)."""
    drawn = density(model).sample(len(test), torch.Generator().manual_seed(seed))
    samples = torch.cat([decode(model, latents) for latents in drawn.split(BATCH)])
    device = model.bias.device
    with user_input():
        real, sampled, copied = (
            features_of(features.extractor, images, device=device)
            for images in (test, samples, reconstructed.clamp(0, 1))
        )
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
    with user_input():
        return {
            "features": features.name,
            "dimensions": real.shape[1],
            "images": len(test),
            "samples": frechet_distance(real, sampled),
            "reconstructions": frechet_distance(real, copied),
            "halves": frechet_distance(real[order[::2]], real[order[1::2]]),
        }


def show_frechet(figures: dict[str, Any]) -> None:
    """The table of distances."""
    lines = [
        ["samples, as `jiio sample` draws them", f"{figures['samples']:.4g}"],
        ["reconstructions", f"{figures['reconstructions']:.4g}"],
        ["real images: one half from the other", f"{figures['halves']:.4g}"],
    ]
    title = f"Frechet distance on features of {figures['features']} ({figures['dimensions']})"
    note = f"from {figures['images']} test images; other features give other figures"
    show(title, ("to", "distance"), lines, note=note)
