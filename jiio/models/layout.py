"""Feature maps with their channels last in memory, where convolutions and pooling are quickest, and how they stay so.

One map, weight or gradient in PyTorch's own order makes every operation after it copy: an evaluation of f and its
vector-Jacobian product on 360 digits took a third longer with one in the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jiio.models.injection import Maps, Shape


def zeros(like: Tensor, shapes: Sequence[Shape]) -> Maps:
    """One map of zeros per shape (channels, height, width), for each sample of `like`."""
    return tuple(like.new_zeros(len(like), h, w, c).permute(0, 3, 1, 2) for c, h, w in shapes)


def kernel(weight: Tensor) -> Tensor:
    """`weight` (outputs, inputs, height, width) with strides that say so even where there is one input channel, which
    `torch.channels_last` leaves undecided.

    >>> kernel(torch.zeros(2, 1, 3, 3)).stride()
    (9, 1, 3, 1)
    """
    return weight.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)


def pooled(head: nn.Linear, shapes: Sequence[Shape]) -> Callable[[Maps], Tensor]:
    """maps -> `head` of all of them, pooled to the coarsest of `shapes`; weights bound once, with graph where gradients are
    enabled. The head's columns are in the order (channels, height, width)."""
    _, height, width = shapes[-1]
    sides = [shape[1] // height for shape in shapes]
    # the mean over a square of side n has norm 1/n, which the weights make 1
    scale = torch.cat([head.weight.new_full((shape[0],), float(n)) for shape, n in zip(shapes, sides, strict=True)])
    weight = (head.weight.unflatten(1, (-1, height, width)).permute(0, 2, 3, 1) * scale).flatten(1)
    bias = head.bias + 0.0

    def read(z: Maps) -> Tensor:
        small = [F.avg_pool2d(part, n) if n > 1 else part for part, n in zip(z, sides, strict=True)]
        return F.linear(torch.cat(small, dim=1).permute(0, 2, 3, 1).flatten(1), weight, bias)

    return read
