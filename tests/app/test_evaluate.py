"""`jiio evaluate` of a generator: damages asked for, SSIM, Frechet distances."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jiio.app.evaluate import IN_RANGE, POSTERIOR, Quality, enlarged, evaluate_damage, show_damages
from jiio.app.frechet import show_frechet
from jiio.app.main import main
from jiio.app.run_folder import RunFolder
from jiio.data import load_images
from jiio.load import load
from jiio.models import Generator, generator
from jiio.tasks.measurement import Downsample, Identity, measure
from jiio.tasks.metrics import psnr
from jiio.tasks.ppca import PPCA
from jiio.tasks.ssim import ssim
from tests.app.runs import CONFIG, digits, tiny_run
from tests.app.test_features import scripted


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run folder."""
    return tiny_run(tmp_path_factory.mktemp("runs") / "tiny").path


def evaluated(run: Path, *options: object) -> dict:
    """The report of `jiio evaluate`."""
    figures = run / "figures.json"
    common = ("--images", 12, "--draws", 1, "--threads", 1, "--json", figures)
    assert main([str(part) for part in ("evaluate", run, *common, *options)]) == 0
    return json.loads(figures.read_text())


def test_damages_asked_for_are_evaluated_with_ssim_and_share_converged(run: Path) -> None:
    report = evaluated(run, "--damages", "blur", "superresolution", "pixels")
    assert report["damages"] == ["blur", "superresolution", "pixels"] and "hole" not in report
    for name in report["damages"]:
        found = report[name]
        for key in ("damaged", "restored", "posterior", "baseline", "baseline_posterior", "baseline_residual"):
            assert found[f"psnr_{key}"]["mean"] > 0
            assert -1 <= found[f"ssim_{key}"]["mean"] <= 1
        assert 0 <= found["converged"]["mean"] <= 1
    assert 0 < report["reconstruction"]["300"]["ssim"] <= 1
    assert (run / "restoration.png").exists()


def test_frechet_distances_name_their_features(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = evaluated(run, "--damages", "noise-0.2")["frechet"]
    assert own["features"] == "digits-classifier" and own["images"] == 12
    assert "features of digits-classifier" in " ".join(capsys.readouterr().out.split())
    assert all(own[key] > 0 for key in ("samples_mixture", "reconstructions", "halves"))
    assert own == evaluated(run, "--damages", "noise-0.2")["frechet"]
    assert own["samples_mixture"] != evaluated(run, "--damages", "noise-0.2", "--seed", 1)["frechet"]["samples_mixture"]
    theirs = evaluated(run, "--damages", "noise-0.2", "--features", scripted(run / "rows.pt"))["frechet"]
    assert theirs["features"] == "rows.pt" and theirs["dimensions"] == 4


@pytest.mark.parametrize("images, noisy", [(30, True), (479, True), (480, False)])
def test_few_images_for_the_features_are_said_to_give_noise(
    images: int, noisy: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    show_frechet({"features": "net", "dimensions": 48, "images": images, "halves": 0.1})
    shown = " ".join(capsys.readouterr().out.split())
    assert (f"{images} images for 48 features: below 480" in shown) is noisy


def test_mistakes_are_refused_before_any_work(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in [
        (("--damages", "hole", "rust"), "unknown damage 'rust': choose one of hole, pixels, blur, downsample, super"),
        (("--features", "inception"), "--features inception: there is no such file or run"),
        (("--features", "mnist-classifier"), "it takes images of shape (1, 28, 28), these are of (1, 8, 8)"),
        (("--features", "torch:zeros_like"), "the extractor must return (2, features) for 2 images, got (2, 1, 8, 8)"),
        (("--images", "3"), "a Frechet distance needs 4 images or more, got --images 3"),
    ]:
        assert main(["evaluate", str(run), "--threads", "1", *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_latent_as_large_as_an_image_has_no_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(CONFIG, latent=64)
    folder = RunFolder(tmp_path)
    folder.create({"task": "generation", "data": "digits", "size": None, "model": config.to_dict()})
    folder.save_weights(generator(config))
    assert main(["evaluate", str(tmp_path), "--images", "4", "--threads", "1"]) == 2
    assert "latent must lie between 1 and 63 for PCA of 64 numbers an image, got 64" in capsys.readouterr().err


def test_sums_of_quality_are_pooled_psnr_and_mean_ssim() -> None:
    images, truth = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)), digits(5)
    pooled = Quality.of(images[:2], truth[:2]) + Quality.of(images[2:], truth[2:])
    assert pooled.psnr == pytest.approx(psnr(images, truth))
    assert pooled.ssim == pytest.approx(float(ssim(images, truth).mean()), rel=1e-5)


def test_a_hole_is_judged_inside_it_and_its_ssim_with_known_pixels_kept() -> None:
    truth = digits(2)
    inside = torch.zeros(2, 1, 8, 8)
    inside[:, :, 2:4, 2:4] = 1
    found = Quality.of(truth + 0.3 * (1 - inside), truth, inside)
    assert found.psnr == math.inf and found.ssim == pytest.approx(1.0)


def test_a_smaller_measurement_is_judged_enlarged() -> None:
    truth = digits(2)
    small = measure(Downsample(4), truth)
    assert enlarged(small).shape == truth.shape
    assert torch.equal(enlarged(measure(Identity(), truth)), truth)


def test_the_figures_are_those_of_the_restored_images(run: Path) -> None:
    model, images = load(run), load_images("digits", "test")[:6]
    assert isinstance(model, Generator)
    baseline = PPCA.fit(digits(200), 4)
    found = evaluate_damage(model, baseline, images, "pixels", seed=2)
    from jiio.tasks.measurement import PixelMask
    from jiio.tasks.restoration import posterior_mean, restore

    measurement = measure(PixelMask(), images, seed=2)
    restored, _ = restore(model, measurement, on_failure="ignore")
    assert found["psnr_restored"] == pytest.approx(psnr(restored, images))
    assert found["psnr_posterior"] == pytest.approx(psnr(posterior_mean(model, restored, measurement), images))
    assert found["psnr_baseline"] == pytest.approx(psnr(baseline.restore(measurement)[0], images))
    assert found["ssim_restored"] == pytest.approx(float(ssim(restored, images).mean()), rel=1e-4)


def test_no_header_is_cut_off_in_eighty_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    value = {"mean": 0.5, "low": 0.5, "high": 0.5}
    keys = (f"{figure}_{key}" for figure in ("psnr", "ssim") for key in (*IN_RANGE, *POSTERIOR))
    figures = {key: value for key in ("converged", "evaluations", *keys)}
    show_damages("Restoration", {"superresolution": figures}, ["superresolution"])
    shown = capsys.readouterr().out
    assert "SSIM" in shown and "…" not in shown
