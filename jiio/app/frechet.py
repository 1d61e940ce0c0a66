"""Frechet distances of a generator's samples and reconstructions, in `jiio evaluate RUN`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jiio.app.features import Features
from jiio.app.run_folder import user_input
from jiio.app.sample import Kind, decode, density_of
from jiio.app.table import console, show
from jiio.load import device_of
from jiio.models import Generator
from jiio.tasks.frechet import BATCH, features_of, frechet_distance

LABELS = {
    "samples_mixture": "samples, as `jiio sample` draws them",
    "samples_prior": "samples, latents from N(0, 1)",
    "reconstructions": "reconstructions, latents searched for",
    "encoder": "reconstructions by the encoder's mean",
    "halves": "real images: one half from the other",
}
LEAST = 4  # images: a covariance needs two, and the control halves them
# Images a feature, below which sampling makes up much of a distance: two sets of real digits of 30, 60, 360, 480 images
# are 0.063, 0.029, 0.0067, 0.0043 apart on 48 features.
ENOUGH = 10


def frechet_figures(
    model: Generator, features: Features, test: Tensor, copies: dict[str, Tensor], *, kinds: Sequence[Kind], seed: int
) -> dict[str, Any]:
    """Distances from `test` to as many samples from each kind of density and to its named `copies`, and between two
    halves of `test`, which says what sampling alone gives (from half as many images: too much rather than too little)."""
    images = {"test": test} | {name: copy.clamp(0, 1) for name, copy in copies.items()}
    for kind in kinds:
        drawn = density_of(model, kind).sample(len(test), torch.Generator().manual_seed(seed))
        images[f"samples_{kind}"] = torch.cat([decode(model, latents) for latents in drawn.split(BATCH)])
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
    with user_input():
        found = {key: features_of(features.extractor, some, device=device_of(model)) for key, some in images.items()}
        real = found.pop("test")
        return (
            {"features": features.name, "dimensions": real.shape[1], "images": len(test)}
            | {name: frechet_distance(real, values) for name, values in found.items()}
            | {"halves": frechet_distance(real[order[::2]], real[order[1::2]])}
        )


def show_frechet(figures: dict[str, Any]) -> None:
    """The table of distances."""
    lines = [[label, f"{figures[name]:.4g}"] for name, label in LABELS.items() if name in figures]
    title = f"Frechet distance on features of {figures['features']} ({figures['dimensions']})"
    note = f"from {figures['images']} test images; other features give other figures"
    show(title, ("to", "distance"), lines, note=note)
    enough = ENOUGH * figures["dimensions"]
    if figures["images"] < enough:
        console.print(
            f"{figures['images']} images for {figures['dimensions']} features: below {enough} ({ENOUGH} a feature) much "
            "of these distances is sampling noise, more of the control's, which has half the images; take more if there are any"
        )
