"""What an attacker may do to an image: a norm ball around it inside the pixel box."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from jiio.constraint import Box, L2Ball, LinfBall
from jiio.intersection import Intersection
from jiio.precondition import Normalized, Sign

Norm = Literal["l2", "linf"]


@dataclass(frozen=True)
class Threat:
    """Images within `radius` of the clean one in the given norm, and within [low, high] in every pixel.

    >>> threat = Threat("l2", 1.0)
    >>> threat.constraint(torch.zeros(2, 1, 2, 2)).project(torch.full((2, 1, 2, 2), 3.0)).flatten(1)[0]
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    norm: Norm = "l2"
    radius: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.norm not in ("l2", "linf"):
            raise ValueError(f"norm must be 'l2' or 'linf', got {self.norm!r}")
        if not self.radius > 0:
            raise ValueError(f"the radius of a threat must be positive, got {self.radius}")
        if not self.low < self.high:
            raise ValueError(f"the pixel box needs low < high, got {self.low} and {self.high}")

    def constraint(self, images: Tensor) -> Intersection:
        """The feasible set around `images` (batch, ...), which must lie in the box."""
        ball = L2Ball(images, self.radius) if self.norm == "l2" else LinfBall(images, self.radius)
        return Intersection(ball, Box(self.low, self.high))

    def rule(self, rate: float) -> Normalized | Sign:
        """The steepest step in this norm, `rate` radii long."""
        return Normalized(rate * self.radius) if self.norm == "l2" else Sign(rate * self.radius)

    def random(self, images: Tensor, seed: int) -> Tensor:
        """A feasible point for each image, from a generator seeded by `seed` and the image's own content, so that it does
        not depend on the rest of the batch: uniform in the ball, then projected on the box."""
        return self.constraint(images).project(images + torch.stack([self._offset(image, seed) for image in images]))

    def _offset(self, image: Tensor, seed: int) -> Tensor:
        # the bytes themselves, for numpy has no bfloat16
        content = zlib.crc32(image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        generator = torch.Generator().manual_seed(content * 1000003 + seed)
        if self.norm == "linf":
            offset = self.radius * (2 * torch.rand(image.shape, generator=generator) - 1)
        else:
            direction = torch.randn(image.shape, generator=generator)
            share = torch.rand((), generator=generator) ** (1 / math.prod(image.shape))
            offset = self.radius * share * direction / torch.linalg.vector_norm(direction)
        return offset.to(image)
