"""Images under a task vector: the injection of an image, scaled and shifted feature by feature (FiLM)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from jiio.models.injection import Maps

Conditioned = tuple[Maps, Tensor]  # the injection of images, and their task vectors (images, size)


class FilmInjection(nn.Module):
    """u(e, v) = (1 + range tanh(A v)) e + B v, channel by channel, for an image's injection e and its task vector v.

    FiLM (Perez et al. 2018), applied to what enters the cell and not to z, so a cell that is a contraction in z stays one;
    the scale is bounded, so e can't be blown up. v = 0 leaves e as it is.

    channels: of the scales of e.  size: entries of v.  span: `range` above, in (0, 1).

    >>> u = FilmInjection((4, 6), size=3).bind()
    >>> e = (torch.ones(2, 4, 4, 4), torch.ones(2, 6, 2, 2))
    >>> bool((u((e, torch.zeros(2, 3)))[0] == e[0]).all())
    True
    """

    def __init__(self, channels: Sequence[int], *, size: int, span: float = 0.5):
        super().__init__()
        if size < 1:
            raise ValueError(f"a task vector needs at least one entry for the scales and shifts, got {size}")
        if not 0 < span < 1:
            raise ValueError(f"span must lie in (0, 1), got {span}")
        self.channels, self.size, self.span = tuple(channels), size, span
        total = sum(self.channels)
        self.scales = nn.Parameter(0.2 * torch.randn(size, total) / size**0.5)
        self.shifts = nn.Parameter(0.2 * torch.randn(size, total) / size**0.5)

    def bind(self) -> Callable[[Conditioned], Maps]:
        """u with its weights fixed, with graph where gradients are enabled."""
        scales, shifts = self.scales + 0.0, self.shifts + 0.0

        def u(given: Conditioned) -> Maps:
            maps, v = given
            factors = (1 + self.span * torch.tanh(v @ scales)).split(self.channels, dim=1)
            offsets = (v @ shifts).split(self.channels, dim=1)
            return tuple(
                torch.addcmul(offset[:, :, None, None], factor[:, :, None, None], entry)
                for entry, factor, offset in zip(maps, factors, offsets, strict=True)
            )

        return u
