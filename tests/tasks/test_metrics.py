from __future__ import annotations

import math

import pytest
import torch

from jiio.tasks.metrics import each_psnr, interval, psnr


def test_psnr_pools_the_error_over_the_set() -> None:
    truth = torch.zeros(2, 1, 1, 1)
    images = torch.tensor([0.1, 0.3]).view(2, 1, 1, 1)
    assert psnr(images, truth) == pytest.approx(-10 * math.log10(0.05))
    assert each_psnr(images, truth) == pytest.approx([20.0, -20 * math.log10(0.3)])


def test_outputs_are_clipped() -> None:
    assert psnr(torch.full((1, 1, 1, 1), 1.7), torch.ones(1, 1, 1, 1)) == math.inf


def test_a_mask_restricts_the_error() -> None:
    truth, images = torch.zeros(1, 1, 1, 2), torch.tensor([0.1, 1.0]).view(1, 1, 1, 2)
    assert psnr(images, truth, torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)) == pytest.approx(20.0)


def test_interval_is_students_t() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found["high"] - found["mean"] == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert interval([2.0]) == {"mean": 2.0, "low": 2.0, "high": 2.0}
