from __future__ import annotations

import json
from pathlib import Path

import pytest

from jiio.app import demo
from tests.app.runs import CONFIG, digits


def test_the_demo_writes_a_whole_report_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On few images, with a tiny generator and one rate of the outer optimiser."""
    monkeypatch.setattr(demo, "load_images", lambda name, split: digits(64))
    monkeypatch.setattr(demo, "default_config", lambda shape: CONFIG)
    monkeypatch.setattr(demo, "ADAM_RATES", (0.2,))
    monkeypatch.setattr(demo, "TUNED", 8)
    monkeypatch.setattr(demo, "COMPARED", 8)
    demo.demo(tmp_path, steps=10)
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"data", "images", "latent", "seeds", "hole", "noise-0.2", "noise-0.4", "speed"} <= set(report)
    assert (report["data"], report["images"], report["latent"], report["seeds"]) == ("digits", 64, 4, [0, 1, 2])
    for damage in ("hole", "noise-0.2", "noise-0.4"):
        keys = {"psnr_damaged", "psnr_restored", "psnr_baseline", "converged", "evaluations", "seconds"}
        assert keys <= set(report[damage])
        assert all(set(report[damage][key]) == {"mean", "low", "high"} for key in keys)
    assert set(report["speed"]) == {"work_ratio", "seconds_ratio", "target_cost"}
    assert (tmp_path / "restoration.png").exists()
