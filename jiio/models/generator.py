"""A generator: latent vector -> equilibrium -> image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jiio.models import layout
from jiio.models.activation import Name
from jiio.models.cell import Cell, WellPosedCell
from jiio.models.config import ScaledConfig
from jiio.models.injection import LatentInjection, Maps, Shape
from jiio.models.mdeq import MDEQ
from jiio.models.spectral import convolution_norm

# The readout's sigmoid goes from -MARGIN to 1 + MARGIN: black and white are reached at a slope that is not yet 0, which
# keeps the curvatures of the latents of different images within a factor (docs/experiments.md).
MARGIN = 0.1
THUMBNAIL = 28**2  # numbers that the linear encoder sees of an image, at most


@dataclass(frozen=True)
class GeneratorConfig(ScaledConfig):
    """All that rebuilds a `Generator` but its weights. `to_dict` and `from_dict` go through JSON.

    image_shape: (channels, height, width).  latent: entries of x.  channels: of the cell's scales, finest first; the
    finest has sides / patch, each further one half of that.  driven: the scales that x enters.  contraction, unit_gain,
    readout_gain: bounds on the cell in z, in x (`LatentInjection`) and on the readout.  components: of the density of latents.
    """

    image_shape: Shape = (1, 28, 28)
    latent: int = 32
    channels: tuple[int, ...] = (32, 64)
    patch: int = 2
    cell: Literal["well_posed", "mdeq"] = "well_posed"
    contraction: float = 0.6
    unit_gain: float = 3.0
    readout_gain: float = 4.0
    driven: tuple[int, ...] | None = None
    activation: Name = "silu"
    components: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent < 1:
            raise ValueError(f"a generator needs a latent of at least 1 entry, got {self.latent}")
        if not self.readout_gain > 0:
            raise ValueError(f"readout_gain must be positive, got {self.readout_gain}")


class Generator(nn.Module):
    """x (batch, latent) -> z* = f(z*, x) -> image (batch, channels, height, width), in (-0.1, 1.1).

    The readout is one 3x3 convolution of the finest scale, of norm at most `readout_gain`, a pixel shuffle and a
    stretched sigmoid: cheaper than f. Bind once per solve: `f = model.cell()`, `readout = model.decoder()`.

    Buffers that training keeps up to date, for the latent problems of `jiio.tasks.generation`: `tangent` (pixels,
    latent), the average derivative of the image before its sigmoid, and `spread`, its scatter; `response` (latent, numbers in
    z), the average dz*/dx in half precision, a row of each latent in the order of storage; `density_...`, a mixture
    of Gaussians fitted to the latents of the training images; `residual_variance` and `residual_spectrum`, of what images
    stray by from their reconstructions (`jiio.tasks.residual.Residual`); `encoder`, a linear map from `features` of an image
    to a first guess of its latent (0 before training).

    >>> model = generator(GeneratorConfig(image_shape=(1, 8, 8), latent=16, channels=(8, 16)))
    >>> x = torch.zeros(2, 16)
    >>> model.readout(model.cell()(model.start(x), x)).shape
    torch.Size([2, 1, 8, 8])
    """

    tangent: Tensor
    spread: Tensor
    response: Tensor
    encoder: Tensor
    density_weight: Tensor
    density_mean: Tensor
    density_precision: Tensor
    density_log_peak: Tensor
    residual_variance: Tensor
    residual_spectrum: Tensor

    def __init__(self, config: GeneratorConfig, equilibrium: WellPosedCell | MDEQ):
        super().__init__()
        self.config, self.equilibrium = config, equilibrium
        self.thumbnail = min(math.isqrt(THUMBNAIL // config.image_shape[0]), *config.image_shape[1:])
        outputs = config.image_shape[0] * config.patch**2
        width = config.channels[0]
        self.weight = nn.Parameter(0.1 * torch.randn(outputs, width, 3, 3))
        self.openness = nn.Parameter(torch.tensor(-1.0))  # the readout's norm is readout_gain sigmoid(openness)
        self.bias = nn.Parameter(torch.zeros(config.image_shape))
        self.register_buffer("tangent", torch.zeros(math.prod(config.image_shape), config.latent))
        self.register_buffer("spread", torch.zeros(config.latent, config.latent))
        numbers = sum(math.prod(shape) for shape in config.shapes)
        self.register_buffer("response", torch.zeros(config.latent, numbers, dtype=torch.bfloat16))
        self.register_buffer("encoder", torch.zeros(config.image_shape[0] * self.thumbnail**2 + 1, config.latent))
        weight = torch.zeros(config.components)
        weight[0] = 1.0
        self.register_buffer("density_weight", weight)
        self.register_buffer("density_mean", torch.zeros(config.components, config.latent))
        self.register_buffer("density_precision", torch.eye(config.latent).repeat(config.components, 1, 1))
        self.register_buffer("density_log_peak", torch.where(weight > 0, 0.0, -1e30))
        self.register_buffer("residual_variance", torch.ones(config.image_shape))
        self.register_buffer("residual_spectrum", torch.ones(config.image_shape))

    def cell(self) -> Cell:
        """f(z, x) with weights bound once, with graph where gradients are enabled."""
        return self.equilibrium.cell()

    def start(self, x: Tensor) -> Maps:
        """z = 0 for the latents x."""
        return layout.zeros(x, self.config.shapes)

    def tangent_of_z(self) -> Maps:
        """The average dz*/dx, each map (1, latent, channels, height, width), from `response`; 0 before it was measured."""
        sizes = [math.prod(shape) for shape in self.config.shapes]
        rows = self.response.to(self.bias.dtype)[None].split(sizes, dim=2)
        maps = zip(rows, self.config.shapes, strict=True)
        return tuple(part.view(1, -1, h, w, c).permute(0, 1, 4, 2, 3) for part, (c, h, w) in maps)

    def keep_tangent_of_z(self, maps: Maps) -> None:
        """Set `response` by dz*/dx, each map (latent, channels, height, width)."""
        with torch.no_grad():
            self.response.copy_(torch.cat([part.permute(0, 2, 3, 1).flatten(1) for part in maps], dim=1))

    def decoder(self) -> Callable[[Maps], Tensor]:
        """The readout z -> image with weights bound once, with graph where gradients are enabled."""
        linear, bias = self.linear_decoder(), self.bias + 0.0
        return lambda z: (1 + 2 * MARGIN) * torch.sigmoid(linear(z) + bias) - MARGIN

    def linear_decoder(self) -> Callable[[Maps], Tensor]:
        """The linear part of the readout: neither bias nor sigmoid."""
        norm = self.config.readout_gain * torch.sigmoid(self.openness)
        weight = self.weight * (norm / convolution_norm(self.weight).clamp_min(1e-12))
        return lambda z: F.pixel_shuffle(F.conv2d(z[0], weight, padding=1), self.config.patch)

    @staticmethod
    def slope(image: Tensor) -> Tensor:
        """Derivative of the stretched sigmoid where the readout gave `image`."""
        return (image + MARGIN) * (1 + MARGIN - image) / (1 + 2 * MARGIN)

    def features(self, images: Tensor) -> Tensor:
        """What the linear encoder sees: a thumbnail of each image and a 1, (batch, rows of `encoder`)."""
        small = F.adaptive_avg_pool2d(images, self.thumbnail).flatten(1)
        return torch.cat((small, small.new_ones(len(small), 1)), dim=1)

    def guess(self, images: Tensor) -> Tensor:
        """A first guess of the latents of `images`, (batch, latent)."""
        return self.features(images) @ self.encoder

    def calibrate(self, images: Tensor) -> None:
        """Set the bias so that a readout of 0 gives the mean of `images` (batch, channels, height, width)."""
        mean = images.mean(0).clamp(0, 1)
        with torch.no_grad():
            self.bias.copy_(torch.logit((mean + MARGIN) / (1 + 2 * MARGIN)))

    def readout(self, z: Maps) -> Tensor:
        """The image of an equilibrium, (batch, channels, height, width)."""
        return self.decoder()(z)


def generator(config: GeneratorConfig) -> Generator:
    """A `Generator` with fresh weights from torch's global random state.

    >>> generator(GeneratorConfig()).config.shapes
    ((32, 14, 14), (64, 7, 7))
    """
    injection = LatentInjection(config.latent, config.shapes, driven=config.driven, unit_gain=config.unit_gain)
    return Generator(config, config.build_cell(injection))
