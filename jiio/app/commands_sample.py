"""`jiio sample RUN`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jiio.app.commands import WithData, images_of, open_generator
from jiio.app.run_folder import UserError
from jiio.app.table import console
from jiio.tasks.generation import PRIOR

Positional = tyro.conf.Positional


@dataclass(frozen=True, kw_only=True)
class Sample(WithData):
    """Draw new images from the density of a generator's latents; test images reconstructed, interpolated, and added.

    Example: jiio sample mnist-generator --data-dir DATA
    """

    run: Positional[str] = "digits-generator"
    """Run folder or the name of a packaged model."""
    rows: int = 6
    """Rows of ten images."""
    density: Literal["mixture", "gaussian", "prior"] = "mixture"
    """mixture of Gaussians fitted to the latents; one gaussian of their mean and covariance; prior, a VAE's own N(0, 1)."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("samples")
    """Folder for samples.png, reconstructions.png, interpolation.png and arithmetic.png."""


def sample(options: Sample) -> dict[str, Any]:
    """`jiio sample RUN`."""
    from jiio.app.sample import sample as run

    _, model, config = open_generator(options.run, options.device)
    if options.density == "prior" and config["task"] != "vae":
        raise UserError("--density prior is for a VAE; this generator was trained without one: use mixture or gaussian")
    test = images_of(config, "test", options.data_dir)
    prior = config.get("training", {}).get("prior", PRIOR)
    found = run(
        model, test, rows=options.rows, kind=options.density, prior=prior, seed=options.seed, output=options.output
    )
    console.print(f"pictures: {', '.join(found['pictures'])}")
    return found
