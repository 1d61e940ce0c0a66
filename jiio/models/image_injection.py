"""How an image enters a cell: an explicit convolutional network u(x) of bounded gain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jiio.models.activation import Activation
from jiio.models.injection import Maps, Shape
from jiio.models.layout import kernel
from jiio.models.spectral import convolution_norm


class ImageInjection(nn.Module):
    """u(x) for images x (batch, channels, height, width): patches, a 3x3 convolution and an activation, then one 3x3
    convolution for each scale of z.

    Each convolution is divided by a certified bound on its norm and given a learned gain of at most `limit`, so
    |u(x) - u(x')| <= limit^2 |x - x'| sqrt(scales) whatever the parameters: an attacked pixel moves the equilibrium by a
    bounded amount, and the attack's curvature stays bounded while the model trains.

    image_shape: (channels, height, width).  shapes: of the scales of z, finest first, whose sides are those of the image
    over `patch`, each further one half of that.

    >>> u = ImageInjection((1, 8, 8), [(4, 4, 4), (6, 2, 2)], patch=2)
    >>> [tuple(part.shape) for part in u.bind()(torch.zeros(3, 1, 8, 8))]
    [(3, 4, 4, 4), (3, 6, 2, 2)]
    """

    def __init__(
        self,
        image_shape: Shape,
        shapes: Sequence[Shape],
        *,
        patch: int = 2,
        limit: float = 6.0,
        activation: Activation = Activation("silu"),
    ):
        super().__init__()
        if not limit > 0:
            raise ValueError(f"limit must be positive, got {limit}")
        _check_sides(image_shape, shapes, patch)
        self.shapes, self.patch, self.limit, self.activation = tuple(shapes), patch, limit, activation
        width = shapes[0][0]
        self.stem = nn.Parameter(0.1 * torch.randn(width, image_shape[0] * patch**2, 3, 3))
        self.stem_bias = nn.Parameter(torch.zeros(width))
        self.heads = nn.ParameterList(nn.Parameter(0.1 * torch.randn(count, width, 3, 3)) for count, _, _ in shapes)
        self.biases = nn.ParameterList(nn.Parameter(0.5 * torch.randn(count)) for count, _, _ in shapes)
        self.openness = nn.Parameter(torch.zeros(1 + len(shapes)))  # gains are limit * sigmoid(openness)

    @property
    def gain(self) -> float:
        """Bound on |u(x) - u(x')| / |x - x'|, whatever the parameters."""
        return self.limit**2 * math.sqrt(len(self.shapes))

    def bind(self) -> Callable[[Tensor], Maps]:
        """u with its weights normalised once, with graph where gradients are enabled."""
        gains = self.limit * torch.sigmoid(self.openness)
        stem = _of_norm(self.stem, gains[0] / self.activation.lipschitz)
        # the mean over 2x2 has norm 1/2
        heads = [
            _of_norm(weight, 2**s * gain) for s, (weight, gain) in enumerate(zip(self.heads, gains[1:], strict=True))
        ]
        stem_bias, biases = self.stem_bias.clone(), [bias.clone() for bias in self.biases]

        def u(x: Tensor) -> Maps:
            patches = F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x
            h = self.activation(F.conv2d(patches, stem, stem_bias, padding=1))
            maps = [F.conv2d(h, heads[0], biases[0], padding=1)]
            for weight, bias in zip(heads[1:], biases[1:], strict=True):
                h = F.avg_pool2d(h, 2)
                maps.append(F.conv2d(h, weight, bias, padding=1))
            return tuple(maps)

        return u


def _check_sides(image_shape: Shape, shapes: Sequence[Shape], patch: int) -> None:
    if patch < 1 or not shapes:
        raise ValueError(f"an image injection needs a patch of at least 1 and a scale, got {patch} and {tuple(shapes)}")
    for s, shape in enumerate(shapes):
        if any(side * (patch << s) != whole for side, whole in zip(shape[1:], image_shape[1:], strict=True)):
            raise ValueError(
                f"scale {s} of z, {tuple(shape)}, must have the sides of the image {tuple(image_shape)} over {patch << s} = "
                f"patch {patch} times 2 for each further scale: change shapes or patch, or resize the image"
            )


def _of_norm(weight: Tensor, gain: Tensor) -> Tensor:
    return kernel(weight * (gain / convolution_norm(weight).clamp_min(1e-12)))
