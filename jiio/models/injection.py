"""How the input x enters a cell: u(x), one map per scale, with a bounded gain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Maps = tuple[Tensor, ...]  # one feature map (batch, channels, height, width) per scale, finest first
Shape = tuple[int, int, int]  # channels, height, width


class Injection(Protocol):
    """An explicit network u(x), of whatever x the cell is given. `bind` fixes its weights for a solve."""

    def bind(self) -> Callable[[Any], Maps]: ...


class LatentInjection(nn.Module):
    """u(x) = bias + g Q x for a latent vector x (batch, latent); Q has orthonormal columns, so every |u| / |x| is g.

    Neither a direction of x can die nor one grow: the latent problem keeps its conditioning however long it is trained
    (with a free linear map its curvature grew a hundredfold within 800 optimiser steps). The bias is drawn at random:
    a cell that is 0 at x = 0 may have no gradient there.
    shapes: (channels, height, width) of the cell's scales, finest first.  driven: the scales that x enters; all by
    default.  unit_gain: root mean square of a driven entry of g Q x for x of unit variance; g = unit_gain
    sqrt(entries / latent) is the property `gain`.

    >>> u = LatentInjection(4, [(8, 6, 6), (16, 3, 3)])
    >>> [tuple(part.shape) for part in u.bind()(torch.zeros(2, 4))]
    [(2, 8, 6, 6), (2, 16, 3, 3)]
    """

    def __init__(
        self, latent: int, shapes: Sequence[Shape], *, driven: Sequence[int] | None = None, unit_gain: float = 1.0
    ):
        super().__init__()
        self.shapes = tuple(shapes)
        self.driven = tuple(range(len(self.shapes)) if driven is None else driven)
        sizes = [math.prod(shape) for shape in self.shapes]
        entries = sum(sizes[scale] for scale in self.driven)
        if not 1 <= latent <= entries:
            raise ValueError(f"a latent of {latent} needs between 1 and the {entries} entries of the driven scales")
        if not unit_gain > 0:
            raise ValueError(f"unit_gain must be positive, got {unit_gain}")
        self.latent, self.unit_gain = latent, unit_gain
        # Q does not change with their scale, the relative size of an optimiser's step does: Q needs to learn fast
        self.columns = nn.Parameter(torch.randn(entries, latent) / math.sqrt(entries))
        self.bias = nn.ParameterList(nn.Parameter(0.5 * torch.randn(size)) for size in sizes)

    @property
    def gain(self) -> float:
        """g: exactly |u(x) - u(x')| / |x - x'|."""
        return self.unit_gain * math.sqrt(self.columns.shape[0] / self.latent)

    def bind(self) -> Callable[[Tensor], Maps]:
        """u with Q computed once, differentiable in the parameters where gradients are enabled."""
        matrix = self.gain * torch.linalg.qr(self.columns).Q.T
        sizes = [math.prod(self.shapes[scale]) for scale in self.driven]
        parts = dict(zip(self.driven, matrix.split(sizes, dim=1), strict=True))
        biases = [bias.clone() for bias in self.bias]  # without history where gradients are off, as the matrix

        def u(x: Tensor) -> Maps:
            flat = [
                torch.addmm(bias, x, parts[scale]) if scale in parts else bias.expand(len(x), -1)
                for scale, bias in enumerate(biases)
            ]
            return tuple(_as_map(entry, shape) for entry, shape in zip(flat, self.shapes, strict=True))

        return u


def _as_map(flat: Tensor, shape: Shape) -> Tensor:
    """(batch, entries) -> (batch, channels, height, width), channels last in memory: pooling is 8 times faster so."""
    channels, height, width = shape
    return flat.view(-1, height, width, channels).permute(0, 3, 1, 2)
