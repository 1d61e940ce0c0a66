"""A multi-scale equilibrium cell that is a contraction in z, and of bounded gain in x, by construction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jiio.models.activation import Activation
from jiio.models.injection import Injection, Maps
from jiio.models.layout import kernel
from jiio.models.spectral import convolution_norm

Cell = Callable[[Maps, Tensor], Maps]


class WellPosedCell(nn.Module):
    """f(z, x) = act(contraction W z + u(x)), each Lipschitz constant of the activation divided out.

    z is one map per scale, (batch, channels[s], side / 2^s, side / 2^s), finest first. W holds 3x3 convolutions within
    each scale and, at the coarser resolution, between neighbouring scales (average pool down, its transpose up, both
    scaled to norm 1). It is divided by a certified upper bound on its own norm: the norm of the matrix of its blocks'
    norms, each bounded by `convolution_norm`. Hence, whatever the parameters,

        |f(z, x) - f(z', x)| <= contraction |z - z'|,      |f(z, x) - f(z, x')| <= injection.gain |x - x'|,

    so there is one equilibrium for every x, plain iteration reaches it, and |dz*/dx| <= gain / (1 - contraction).

    injection: u, an explicit module such as `LatentInjection`.  contraction: in (0, 1).  Each scale has half the sides
    of the one before.

    >>> from jiio.models.injection import LatentInjection
    >>> model = WellPosedCell(LatentInjection(4, [(8, 6, 6), (16, 3, 3)]), channels=(8, 16))
    >>> x = torch.zeros(2, 4)
    >>> [tuple(part.shape) for part in model.cell()(model.start(x), x)]
    [(2, 8, 6, 6), (2, 16, 3, 3)]
    """

    def __init__(
        self,
        injection: Injection,
        *,
        channels: Sequence[int] = (32, 64),
        contraction: float = 0.9,
        activation: Activation = Activation("silu"),
    ):
        super().__init__()
        if not 0 < contraction < 1:
            raise ValueError(f"contraction must lie in (0, 1), got {contraction}")
        if not channels or min(channels) < 1:
            raise ValueError(f"channels needs one positive number per scale, got {tuple(channels)}")
        shapes = getattr(injection, "shapes", None)
        if shapes is not None and tuple(shape[0] for shape in shapes) != tuple(channels):
            raise ValueError(f"channels {tuple(channels)} are not those of the injection's shapes {tuple(shapes)}")
        self.injection, self.channels = injection, tuple(channels)
        self.contraction, self.activation = contraction, activation
        # weights[0] acts within the finest scale; weights[s] on scale s and the pooled scale s - 1, and back to both
        widths = [self.channels[0], *(a + b for a, b in zip(self.channels[1:], self.channels, strict=False))]
        # W does not change with their scale, the relative size of an optimiser's step does: 0.1 suits rates of 2e-3
        self.weights = nn.ParameterList(nn.Parameter(0.1 * torch.randn(width, width, 3, 3)) for width in widths)

    def cell(self) -> Cell:
        """f with the weights normalised once, with graph where gradients are enabled. Bind it once per solve."""
        weights = self.operator()
        u = self.injection.bind()
        inverse = 1 / self.activation.lipschitz

        def f(z: Maps, x: Tensor) -> Maps:
            moved = self._mix(weights, z)
            return tuple(
                self.activation(torch.add(part, entry, alpha=inverse)) for part, entry in zip(moved, u(x), strict=True)
            )

        return f

    def start(self, x: Tensor) -> Maps:
        """z = 0 for the inputs x."""
        with torch.no_grad():
            return tuple(torch.zeros_like(entry) for entry in self.injection.bind()(x))

    def operator(self) -> tuple[Tensor, ...]:
        """The weights of contraction / lipschitz * W, of norm at most contraction / lipschitz in any case, as `_mix` takes
        them: the mean over 2x2 has norm 1/2, copying to 2x2 norm 2, and what makes both 1 is in here."""
        scale = self.contraction / self.activation.lipschitz / self.norm_bound().clamp_min(1e-12)
        weights = [self.weights[0]]
        for own, weight in zip(self.channels[1:], self.weights[1:], strict=True):
            share = weight.new_ones(len(weight))
            share[own:] = 0.5
            weights.append(weight * share[:, None, None, None] / share[:, None, None])
        return tuple(kernel(scale * weight) for weight in weights)

    def norm_bound(self) -> Tensor:
        """Certified upper bound on the norm of W before it is divided by it; a scalar, with graph."""
        scales = len(self.channels)
        rows: list[list[Tensor]] = [[self.weights[0].new_zeros(()) for _ in range(scales)] for _ in range(scales)]
        rows[0][0] = convolution_norm(self.weights[0])
        for s in range(1, scales):
            width = self.channels[s]
            upper, lower = self.weights[s].split((width, self.channels[s - 1]))
            for target, block in ((s, upper), (s - 1, lower)):
                rows[target][s] = rows[target][s] + convolution_norm(block[:, :width])
                rows[target][s - 1] = rows[target][s - 1] + convolution_norm(block[:, width:])
        return torch.linalg.matrix_norm(torch.stack([torch.stack(row) for row in rows]), ord=2)

    def _mix(self, weights: Sequence[Tensor], z: Maps) -> list[Tensor]:
        """W z."""
        moved = [F.conv2d(z[0], weights[0], padding=1)]
        for s in range(1, len(z)):
            pooled = F.avg_pool2d(z[s - 1], 2)
            both = F.conv2d(torch.cat((z[s], pooled), dim=1), weights[s], padding=1)
            own, up = both.split((self.channels[s], self.channels[s - 1]), dim=1)
            moved[-1] = moved[-1] + F.interpolate(up, scale_factor=2, mode="nearest")
            moved.append(own)
        return moved
