"""What a generator makes of its images, and from nothing, while it is being trained."""

from __future__ import annotations

from pathlib import Path

import torch

from jiio.app.figure import image_grid
from jiio.app.run_folder import writing
from jiio.app.sample import COLUMNS, decode
from jiio.app.train_generation import Trainer
from jiio.tasks.density import LatentDensity
from jiio.tasks.generation import reconstruct

RECONSTRUCTION_STEPS = 40
FITTED_LATENTS = 2048  # the density is fitted to no more of them: a second


def draw_samples(trainer: Trainer, path: Path) -> Path:
    """A picture of up to ten training images, their reconstructions, and twice as many images from a density fitted to the
    latents that the training has found so far. Changes nothing of the training, nor of torch's random state."""
    model, rows = trainer.model, torch.arange(min(COLUMNS, len(trainer.images)))
    with torch.no_grad():
        images, seen = trainer.seen(rows)
        found, _ = reconstruct(
            model,
            images,
            prior=trainer.training.prior,
            latent=seen @ trainer.guess,
            max_steps=RECONSTRUCTION_STEPS,
            on_failure="ignore",
        )
    latents = trainer.latents[trainer.latents.any(1)][:FITTED_LATENTS]
    density = LatentDensity.fit(latents, components=model.config.components)
    generator = torch.Generator().manual_seed(trainer.training.seed)
    drawn = decode(model, density.sample(2 * len(rows), generator).to(trainer.device))
    first, second = drawn.split(len(rows))
    rows_shown = (("images", images.cpu()), ("reconstructed", found.cpu()), ("sampled", first), ("", second))
    with writing(path.parent):
        return image_grid([(label, some, None) for label, some in rows_shown], path, title=f"step {trainer.step}")
