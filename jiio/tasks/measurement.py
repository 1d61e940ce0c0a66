"""Measurements y = A image + noise: linear operators as objects, drawn per sample.

Images are (batch, channels, height, width) in [0, 1]. Published noise levels are often on [-1, 1]: 0.2 there is 0.1 here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_PROBES = 32
LARGEST_SIDE = 32  # of a hidden square that counts: nothing is known of larger ones, and looking for them takes long
Shape = tuple[int, int, int]  # channels, height, width
Parameters = tuple[Tensor, ...]


class Operator(Protocol):
    """A linear operator with parameters that are drawn for each sample."""

    def draw(self, shape: Shape, generator: torch.Generator) -> Parameters:
        """The parameters of one sample, without the batch."""
        ...

    def apply(self, image: Tensor, *parameters: Tensor) -> Tensor:
        """A image."""
        ...

    def adjoint(self, y: Tensor, *parameters: Tensor) -> Tensor:
        """A^T y."""
        ...


@dataclass(frozen=True)
class Identity:
    """A = 1: denoising."""

    def draw(self, shape: Shape, generator: torch.Generator) -> Parameters:
        """Nothing to draw."""
        return ()

    def apply(self, image: Tensor, *parameters: Tensor) -> Tensor:
        """The image."""
        return image

    def adjoint(self, y: Tensor, *parameters: Tensor) -> Tensor:
        """y."""
        return y


class _Masked:
    """A = diag(mask), mask (batch, 1, height, width), 1 where a pixel is known."""

    def apply(self, image: Tensor, *parameters: Tensor) -> Tensor:
        """The image, 0 where unknown."""
        return image * parameters[0]

    def adjoint(self, y: Tensor, *parameters: Tensor) -> Tensor:
        """The same."""
        return y * parameters[0]


@dataclass(frozen=True)
class Mask(_Masked):
    """Known pixels given by a mask (1, height, width), or one for each channel, the same for every sample: a user's own
    damaged image."""

    mask: Tensor = field(repr=False)

    def draw(self, shape: Shape, generator: torch.Generator) -> Parameters:
        """The mask; `ValueError` when it has not the image's size."""
        if tuple(self.mask.shape) not in ((1, *shape[1:]), shape):
            raise ValueError(f"the mask has shape {tuple(self.mask.shape)}, the image needs {(1, *shape[1:])}")
        return (self.mask,)


@dataclass(frozen=True)
class Hole(_Masked):
    """A square hole at a random place; `side` in pixels, by default round(sqrt(0.1 height width)): a tenth of the area.

    >>> Hole().draw((1, 28, 28), torch.Generator().manual_seed(0))[0].eq(0).sum()
    tensor(81)
    """

    side: int | None = None

    def draw(self, shape: Shape, generator: torch.Generator) -> Parameters:
        """The mask of one sample, (1, height, width)."""
        _, height, width = shape
        side = round((0.1 * height * width) ** 0.5) if self.side is None else self.side
        if not 0 < side <= min(height, width):
            raise ValueError(f"a hole of side {side} does not fit an image of {height}x{width}")
        top = int(torch.randint(height - side + 1, (), generator=generator))
        left = int(torch.randint(width - side + 1, (), generator=generator))
        mask = torch.ones(1, height, width)
        mask[:, top : top + side, left : left + side] = 0
        return (mask,)


@dataclass(frozen=True)
class PixelMask(_Masked):
    """Each pixel known with probability `keep`."""

    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must lie in (0, 1], got {self.keep}")

    def draw(self, shape: Shape, generator: torch.Generator) -> Parameters:
        """The mask of one sample, (1, height, width)."""
        return ((torch.rand(1, *shape[1:], generator=generator) < self.keep).float(),)


@dataclass(frozen=True)
class GaussianBlur:
    """Convolution with a Gaussian of standard deviation `sigma` pixels, cut at 3 sigma, zero outside the image."""

    sigma: float = 1.0

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(f"the sigma of a blur must be positive, got {self.sigma}")

    def draw(self, shape: Shape, generator: torch.Generator) -> Parameters:
        """Nothing to draw."""
        return ()

    def apply(self, image: Tensor, *parameters: Tensor) -> Tensor:
        """The blurred image."""
        # products with the kernel's matrix along each axis: a fifteenth of conv2d's time for 64x64 on a CPU, a third for 28x28
        return self._along(image.shape[-2], image) @ image @ self._along(image.shape[-1], image)

    def _along(self, side: int, like: Tensor) -> Tensor:
        """The kernel as a symmetric matrix (side, side), of the type of `like`."""
        reach = max(1, round(3 * self.sigma))
        places = torch.arange(-reach, side + reach, dtype=like.dtype, device=like.device)
        offsets = places - places[reach : reach + side, None]
        kernel = torch.exp(-0.5 * (offsets / self.sigma) ** 2) * (offsets.abs() <= reach)
        return kernel[:, reach : reach + side] / kernel[0].sum()

    def adjoint(self, y: Tensor, *parameters: Tensor) -> Tensor:
        """A symmetric kernel with zero padding is its own adjoint."""
        return self.apply(y)


@dataclass(frozen=True)
class Downsample:
    """Means over blocks of `factor` x `factor` pixels: super-resolution."""

    factor: int = 2

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"the factor of a downsampling must be at least 1, got {self.factor}")

    def draw(self, shape: Shape, generator: torch.Generator) -> Parameters:
        """Nothing to draw; `ValueError` when the sides do not divide."""
        if shape[1] % self.factor or shape[2] % self.factor:
            raise ValueError(f"an image of {shape[1]}x{shape[2]} does not divide by the factor {self.factor}")
        return ()

    def apply(self, image: Tensor, *parameters: Tensor) -> Tensor:
        """(batch, channels, height / factor, width / factor)."""
        return F.avg_pool2d(image, self.factor)

    def adjoint(self, y: Tensor, *parameters: Tensor) -> Tensor:
        """Each value spread evenly over its block."""
        return F.interpolate(y, scale_factor=float(self.factor), mode="nearest") / self.factor**2


@dataclass(frozen=True)
class Measurement:
    """What was measured: y, the operator with its parameters (each with the batch first), the noise's sigma on [0, 1]."""

    operator: Operator
    y: Tensor
    parameters: Parameters
    sigma: float
    image_shape: Shape

    @property
    def mask(self) -> Tensor | None:
        """Where an operator that only hides pixels shows them, (batch, 1 or channels, height, width); else None."""
        return self.parameters[0] if isinstance(self.operator, _Masked) else None

    @property
    def mixes(self) -> bool:
        """Whether a number that is measured tells of several pixels, as means and blurs do."""
        return self.mask is None and not isinstance(self.operator, Identity)

    @cached_property
    def hidden_side(self) -> int:
        """`hidden_side` of a mask that the operator draws: not of those of the batch, on which no sample may depend."""
        (mask,) = self.operator.draw(self.image_shape, torch.Generator().manual_seed(0))
        return hidden_side(mask)

    @cached_property
    def row_squares(self) -> Tensor:
        """c: the mean square of the rows of each sample's A that are not 0 (mean diagonal of A A^T), (batch,), from random
        signs; 1 where pixels are hidden and not mixed."""
        ones = self.y.new_ones(len(self.y))
        if not self.mixes:
            return ones
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (ROW_PROBES, 1, *self.image_shape), generator=generator).to(self.y) * 2 - 1
        rows = len(self.y) if self.parameters else 1  # without parameters all samples have one operator
        with torch.no_grad():
            seen = [self.operator.apply(sign.expand(rows, *sign.shape[1:]), *self.parameters) for sign in signs]
        diagonal = torch.stack([part.square() for part in seen]).mean(0).flatten(1)
        return ones * diagonal.sum(1) / (diagonal > 0).sum(1).clamp_min(1)

    def select(self, rows: Tensor | slice) -> Measurement:
        """The measurement of some samples."""
        return replace(self, y=self.y[rows], parameters=tuple(part[rows] for part in self.parameters))

    def to(self, device: str | torch.device) -> Measurement:
        """The measurement on `device`."""
        return replace(self, y=self.y.to(device), parameters=tuple(part.to(device) for part in self.parameters))


def hidden_side(mask: Tensor) -> int:
    """Side of the squares that what a mask (channels, height, width) hides in all channels lies in, up to `LARGEST_SIDE`: of
    the largest about each hidden pixel, on average, rounded down. 1 for scattered pixels, 0 where none is hidden.

    >>> hole, stripes = torch.ones(2, 1, 6, 6)
    >>> hole[..., 1:4, 1:4] = 0
    >>> stripes[..., ::2] = 0
    >>> hidden_side(hole), hidden_side(stripes), hidden_side(torch.ones(1, 6, 6))
    (3, 1, 0)
    """
    hidden = (mask == 0).all(0)[None, None].float()
    corners = hidden  # of hidden squares of one side
    inside = 0.0  # hidden pixels that lie in such a square, of all sides in turn
    for side in range(1, min(*hidden.shape[2:], LARGEST_SIDE) + 1):
        wide = F.max_pool2d(F.pad(corners, (side - 1,) * 4), (1, side), stride=1)
        inside += float(F.max_pool2d(wide, (side, 1), stride=1).sum())
        if min(corners.shape[2:]) == 1:
            break
        corners = 1 - F.max_pool2d(1 - corners, 2, stride=1)  # four squares that overlap make the next larger one
    return int(inside / max(float(hidden.sum()), 1.0))


def measure(
    operator: Operator, images: Tensor, *, sigma: float = 0.0, ids: Sequence[int] | None = None, seed: int = 0
) -> Measurement:
    """Damage `images`; sigma is the noise's standard deviation on [0, 1].

    Everything random about a sample comes from its id (its place in the batch by default) and `seed` alone, so it does
    not depend on its batch.

    >>> measure(Hole(), torch.zeros(2, 1, 8, 8)).y.shape
    torch.Size([2, 1, 8, 8])
    """
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must be finite and not negative, got {sigma}")
    ids = range(len(images)) if ids is None else ids
    if len(ids) != len(images):
        raise ValueError(f"{len(images)} images need as many ids, got {len(ids)}")
    shape: Shape = (images.shape[1], images.shape[2], images.shape[3])
    generators = [torch.Generator().manual_seed((1_000_003 * seed + int(i)) % 2**63) for i in ids]
    drawn = [operator.draw(shape, generator) for generator in generators]
    parameters = tuple(torch.stack(parts).to(images) for parts in zip(*drawn, strict=True))
    y = operator.apply(images, *parameters)
    if sigma > 0:
        noise = torch.stack([torch.randn(y.shape[1:], generator=generator) for generator in generators])
        # a pixel that is not measured has no noise either: masks give exactly 0 there
        y = y + sigma * noise.to(y) * (parameters[0] > 0 if isinstance(operator, _Masked) else 1)
    return Measurement(operator, y, parameters, sigma, shape)


DAMAGES: dict[str, Operator] = {
    "hole": Hole(),
    "pixels": PixelMask(),
    "blur": GaussianBlur(),
    "downsample": Downsample(2),
    "superresolution": Downsample(4),
}
EVALUATED = ("hole", "noise-0.2", "noise-0.4")  # unless others are asked for


def damage(name: str) -> tuple[Operator, float]:
    """(operator, sigma on [0, 1]) by name: one of `DAMAGES`, or `noise-S` with S on [-1, 1].

    >>> damage("noise-0.4")
    (Identity(), 0.2)
    """
    if name in DAMAGES:
        return DAMAGES[name], 0.0
    level = name.removeprefix("noise-")
    if level != name and level.replace(".", "", 1).isdigit():
        return Identity(), float(level) / 2
    raise ValueError(f"unknown damage {name!r}: choose one of {', '.join(DAMAGES)}, or noise-0.2 (any level)")
