"""A classifier that a task vector adapts: images and a vector -> features, compared with those of labelled examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jiio.models import layout
from jiio.models.activation import Name
from jiio.models.config import ScaledConfig
from jiio.models.film import FilmInjection
from jiio.models.injection import Maps, Shape
from jiio.models.stem import Stem


@dataclass(frozen=True)
class ContextConfig(ScaledConfig):
    """All that rebuilds a `ContextClassifier` but its weights. `to_dict` and `from_dict` go through JSON.

    image_shape: (channels, height, width).  margin: zeros put around an image, to make its sides divisible.
    channels, patch, contraction: as of `ClassifierConfig`.  width: of the `Stem` before the cell.
    film: entries of the task vector that scale and shift.  features: of an image, which classes are told apart by.
    """

    image_shape: Shape = (1, 28, 28)
    margin: int = 2
    channels: tuple[int, ...] = (32, 64)
    patch: int = 4
    width: int = 64
    film: int = 16
    features: int = 64
    cell: Literal["well_posed", "mdeq"] = "well_posed"
    contraction: float = 0.7
    activation: Name = "silu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features < 1:
            raise ValueError(f"features must be at least 1, got {self.features}")
        if self.margin < 0:
            raise ValueError(f"margin must not be negative, got {self.margin}")

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of an image with its margin."""
        return self.image_shape[1] + 2 * self.margin, self.image_shape[2] + 2 * self.margin


class ContextClassifier(nn.Module):
    """e = inject(images) once a solve; z* = f(z*, v, e); features of z*; logits by distance to each class.

    The task vector of an N-way task has `film` entries v, which scale and shift what enters the cell, and N times
    `features` entries, which move the classes: class n sits at the mean feature of its examples plus its own entries. At 0
    this is a prototypical network (Snell et al. 2017); adapting moves both.

    Buffer `curvature`: of the support objective in the task vector at 0, kept by training; steps are measured by it.
    """

    curvature: Tensor

    def __init__(self, config: ContextConfig):
        super().__init__()
        self.config = config
        self.injection = Stem((config.image_shape[0], *config.sides), config.shapes, width=config.width)
        self.equilibrium = config.build_cell(FilmInjection(config.channels, size=config.film))
        _, height, width = config.shapes[-1]
        self.head = nn.Linear(sum(config.channels) * height * width, config.features)
        self.sharpness = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("curvature", torch.tensor(1.0))

    def inject(self, images: Tensor) -> Maps:
        """What of the images enters the cell, with graph where gradients are enabled."""
        maps = self.injection.bind()(F.pad(images, (self.config.margin,) * 4))
        return tuple(part.contiguous(memory_format=torch.channels_last) for part in maps)

    def cell(self) -> Callable[[Maps, Tensor, Maps], Maps]:
        """f(z, v, e) with weights bound once: v (images, film), e from `inject`."""
        f: Any = self.equilibrium.cell()
        return lambda z, v, e: f(z, (e, v))

    def features(self) -> Callable[[Maps], Tensor]:
        """z -> features (images, features) with weights bound once."""
        return layout.pooled(self.head, self.config.shapes)

    def logits(self) -> Callable[[Tensor, Tensor], Tensor]:
        """(features (tasks, images, p), centres of classes (tasks, ways, p)) -> logits (tasks, images, ways)."""
        sharpness = torch.exp(self.sharpness)

        def compare(found: Tensor, centers: Tensor) -> Tensor:
            squares = (found[:, :, None] - centers[:, None]).square().sum(-1)
            return -sharpness * squares / found.shape[-1] ** 0.5

        return compare

    def start(self, images: Tensor) -> Maps:
        """z = 0 for images."""
        return layout.zeros(images, self.config.shapes)


def context_classifier(config: ContextConfig) -> ContextClassifier:
    """A `ContextClassifier` with fresh weights from torch's global random state."""
    return ContextClassifier(config)
