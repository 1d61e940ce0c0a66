"""What the configurations of all models share: scales that fit the image, the cell, and the way through JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, Self

from jiio.models.activation import Activation, Name
from jiio.models.cell import WellPosedCell
from jiio.models.injection import Injection, Shape
from jiio.models.mdeq import MDEQ


class ScaledConfig:
    """Base of the frozen dataclasses that rebuild a model but its weights. The finest scale of z has the image's sides /
    `patch`, each further one half of that."""

    image_shape: Shape
    channels: tuple[int, ...]
    patch: int
    cell: Literal["well_posed", "mdeq"]
    contraction: float
    activation: Name

    def __post_init__(self) -> None:
        divisor = self.patch * 2 ** (len(self.channels) - 1)
        height, width = self.sides
        if height % divisor or width % divisor or not height or not width:
            raise ValueError(
                f"an image of {height}x{width} does not divide by {divisor} = patch {self.patch} times 2 for each "
                f"further scale of channels {self.channels}: resize or pad it, or use fewer scales or a smaller patch"
            )
        if self.cell not in ("well_posed", "mdeq"):
            raise ValueError(f"cell must be 'well_posed' or 'mdeq', got {self.cell!r}")

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of what z's scales are parts of."""
        return self.image_shape[1], self.image_shape[2]

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """(channels, height, width) of the scales of z."""
        height, width = self.sides
        sides = [(height // (self.patch << s), width // (self.patch << s)) for s in range(len(self.channels))]
        return tuple((count, *side) for count, side in zip(self.channels, sides, strict=True))

    def build_cell(self, injection: Injection) -> WellPosedCell | MDEQ:
        """The cell with fresh weights, x entering by `injection`."""
        if self.cell == "mdeq":
            return MDEQ(injection, channels=self.channels)
        return WellPosedCell(
            injection,
            channels=self.channels,
            contraction=self.contraction,
            activation=Activation(self.activation),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`, also after JSON made lists of the tuples."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)
