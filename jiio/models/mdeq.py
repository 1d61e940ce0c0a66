"""The multiscale equilibrium cell (MDEQ; Bai, Koltun, Kolter, NeurIPS 2020, arXiv 2006.08656), for reproduction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jiio.models.injection import Injection, Maps

Convolution = Callable[[Tensor], Tensor]


class MDEQ(nn.Module):
    """The MDEQ cell as the JIIO paper used it: residual blocks per scale, then fusion across scales.

    Per scale: 3x3 convolution to `expansion` times the channels, group norm, ReLU, 3x3 convolution, + u(x), group norm,
    residual, ReLU, group norm. Fusion: strided 3x3 convolutions down, 1x1 convolution and nearest up-sampling up, sum;
    then ReLU, 1x1 convolution, group norm. Weight norm on the 3x3 and the last 1x1 convolutions, normalised once in
    `cell`. No batch norm.

    Its limits: it is *not* a contraction (fresh or trained, plain iteration and Anderson may not converge: add a
    Jacobian penalty in training and read the status of each solve) and *not* smooth (ReLU): the envelope gradient is
    wrong where the solution sits on a kink. `WellPosedCell` has neither problem.

    injection: u, one map per scale.  groups: of the group norms; it must divide each of `channels`.

    >>> from jiio.models.injection import LatentInjection
    >>> model = MDEQ(LatentInjection(4, [(8, 6, 6), (16, 3, 3)]), channels=(8, 16))
    >>> x = torch.zeros(2, 4)
    >>> [tuple(part.shape) for part in model.cell()(model.start(x), x)]
    [(2, 8, 6, 6), (2, 16, 3, 3)]
    """

    def __init__(
        self, injection: Injection, *, channels: Sequence[int] = (24, 24), expansion: int = 5, groups: int = 8
    ):
        super().__init__()
        for width in channels:
            if width % groups:
                raise ValueError(
                    f"{groups} groups do not divide {width} channels; choose channels in multiples of {groups}"
                )
        self.injection, self.channels, self.groups = injection, tuple(channels), groups
        self.blocks = nn.ModuleList(_Block(width, expansion, groups) for width in channels)
        self.fusion = nn.ModuleList(_Fusion(self.channels, target, groups) for target in range(len(channels)))

    def cell(self) -> Callable[[Maps, Tensor], Maps]:
        """f with the weight-normalised kernels computed once, with graph where gradients are enabled."""
        u = self.injection.bind()
        blocks = [block.bind() for block in self.blocks]  # type: ignore[operator]
        fusion = [fuse.bind() for fuse in self.fusion]  # type: ignore[operator]

        def f(z: Maps, x: Tensor) -> Maps:
            inner = [block(part, entry) for block, part, entry in zip(blocks, z, u(x), strict=True)]
            return tuple(fuse(inner) for fuse in fusion)

        return f

    def start(self, x: Tensor) -> Maps:
        """z = 0 for the inputs x."""
        with torch.no_grad():
            return tuple(torch.zeros_like(entry) for entry in self.injection.bind()(x))


class _NormedConvolution(nn.Module):
    """Weight norm, one length per output channel; Salimans and Kingma, NeurIPS 2016."""

    def __init__(self, inputs: int, outputs: int, size: int):
        super().__init__()
        self.direction = nn.Parameter(0.01 * torch.randn(outputs, inputs, size, size))
        self.length = nn.Parameter(torch.linalg.vector_norm(self.direction.detach(), dim=(1, 2, 3), keepdim=True))

    def bind(self) -> Convolution:
        size = torch.linalg.vector_norm(self.direction, dim=(1, 2, 3), keepdim=True)
        weight = (self.length / size * self.direction).contiguous(memory_format=torch.channels_last)
        return lambda t: F.conv2d(t, weight, padding=weight.shape[-1] // 2)


class _Block(nn.Module):
    """One scale's residual block."""

    def __init__(self, width: int, expansion: int, groups: int):
        super().__init__()
        self.expand = _NormedConvolution(width, expansion * width, 3)
        self.reduce = _NormedConvolution(expansion * width, width, 3)
        self.norms = nn.ModuleList(nn.GroupNorm(groups, count) for count in (expansion * width, width, width))

    def bind(self) -> Callable[[Tensor, Tensor], Tensor]:
        expand, reduce = self.expand.bind(), self.reduce.bind()
        first, second, third = self.norms

        def block(z: Tensor, entry: Tensor) -> Tensor:
            change = second(reduce(first(expand(z)).relu()) + entry)
            return third((change + z).relu())

        return block


class _Fusion(nn.Module):
    """All scales brought to the resolution of one and added."""

    def __init__(self, channels: Sequence[int], target: int, groups: int):
        super().__init__()
        self.paths = nn.ModuleList(_path(channels, source, target, groups) for source in range(len(channels)))
        self.mix = _NormedConvolution(channels[target], channels[target], 1)
        self.norm = nn.GroupNorm(groups, channels[target])

    def bind(self) -> Callable[[Sequence[Tensor]], Tensor]:
        mix = self.mix.bind()

        def fuse(parts: Sequence[Tensor]) -> Tensor:
            moved = [path(part) for path, part in zip(self.paths, parts, strict=True)]
            return self.norm(mix(torch.stack(moved).sum(0).relu()))

        return fuse


def _path(channels: Sequence[int], source: int, target: int, groups: int) -> nn.Module:
    """From one scale's resolution and channels to another's."""
    inputs, outputs = channels[source], channels[target]
    if source == target:
        return nn.Identity()
    if source > target:
        factor = 2 ** (source - target)
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, bias=False), nn.GroupNorm(groups, outputs), nn.Upsample(scale_factor=factor)
        )
    steps: list[nn.Module] = []
    for step in range(source, target):  # ReLU between the strided convolutions, none after the last
        width = outputs if step == target - 1 else inputs
        steps += [nn.Conv2d(inputs, width, 3, stride=2, padding=1, bias=False), nn.GroupNorm(groups, width), nn.ReLU()]
    return nn.Sequential(*steps[:-1])
