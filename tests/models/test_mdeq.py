"""The multiscale cell of the paper."""

from __future__ import annotations

import pytest
import torch

from jiio.models import MDEQ, LatentInjection

SHAPES = ((8, 8, 8), (16, 4, 4), (24, 2, 2))


def build() -> MDEQ:
    return MDEQ(LatentInjection(4, SHAPES), channels=(8, 16, 24), expansion=2)


def test_three_scales_keep_their_shapes() -> None:
    model, x = build(), torch.randn(2, 4)
    z = model.cell()(model.start(x), x)
    assert [tuple(part.shape[1:]) for part in z] == list(SHAPES)
    assert [part.shape for part in model.cell()(z, x)] == [part.shape for part in z]


def test_every_scale_hears_every_other() -> None:
    model, x = build(), torch.randn(1, 4)
    f = model.cell()
    for source in range(3):
        z = tuple(torch.randn(1, *shape) for shape in SHAPES)
        moved = tuple(part + torch.randn_like(part) if s == source else part for s, part in enumerate(z))
        assert all(bool((a - b).norm() > 1e-4) for a, b in zip(f(z, x), f(moved, x), strict=True))


def test_scaling_a_weight_normed_direction_changes_nothing() -> None:
    model, x = build(), torch.randn(1, 4)
    z = tuple(torch.randn(1, *shape) for shape in SHAPES)
    with torch.no_grad():
        before = model.cell()(z, x)
        for name, parameter in model.named_parameters():
            if name.endswith("direction"):
                parameter.mul_(7.0)
        after = model.cell()(z, x)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(before, after, strict=True))


def test_channels_that_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="8 groups do not divide 12 channels"):
        MDEQ(LatentInjection(4, [(12, 4, 4)]), channels=(12,))
