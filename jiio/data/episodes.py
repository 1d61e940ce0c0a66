"""N-way K-shot tasks drawn from characters, reproducible by seed and number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Episodes:
    """Tasks from `images` (classes, drawings, channels, height, width).

    ways: classes of a task.  shots, queries: labelled and unlabelled drawings of each.  turned: rotations by 90, 180 and
    270 degrees count as further classes (for training).  `ValueError` for too few classes or drawings.
    """

    images: Tensor
    ways: int = 5
    shots: int = 1
    queries: int = 5
    turned: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        classes, drawings = self.images.shape[:2]
        if min(self.ways - 1, self.shots, self.queries) < 1:
            raise ValueError(
                f"tasks need at least 2 ways, 1 shot and 1 query, got {self.ways}, {self.shots} and {self.queries}"
            )
        if self.ways > classes * (4 if self.turned else 1):
            raise ValueError(f"{self.ways} ways are more than the {classes} classes there are")
        if self.shots + self.queries > drawings:
            raise ValueError(
                f"{self.shots} shots and {self.queries} queries are more than the {drawings} examples of a class"
            )

    def draw(self, number: int, tasks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(support, labels, query, labels) of batch `number` of `tasks` tasks; the same for the same seed and number."""
        generator = torch.Generator().manual_seed(self.seed * 1000003 + number)
        parts = [self._task(generator) for _ in range(tasks)]
        support, query = (torch.stack([part[i] for part in parts]) for i in range(2))
        labels = torch.arange(self.ways)
        return (
            support,
            labels.repeat_interleave(self.shots).expand(tasks, -1),
            query,
            labels.repeat_interleave(self.queries).expand(tasks, -1),
        )

    def _task(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        classes, drawings = self.images.shape[:2]
        chosen = torch.randperm(classes * (4 if self.turned else 1), generator=generator)[: self.ways]
        support, query = [], []
        for number in chosen.tolist():
            rows = torch.randperm(drawings, generator=generator)[: self.shots + self.queries]
            images = torch.rot90(self.images[number % classes, rows], number // classes, dims=(-2, -1))
            support.append(images[: self.shots])
            query.append(images[self.shots :])
        return torch.cat(support), torch.cat(query)
