"""`jiio train vae`, and the commands that take its runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import jiio
from jiio.app.main import main
from jiio.app.run_folder import UserError
from jiio.app.train_vae import Trainer, Training
from jiio.data import load_images, write_image
from jiio.models import VAE, VAEConfig
from tests.app.runs import digits, whole_and_resumed

CONFIG = VAEConfig(image_shape=(1, 8, 8), latent=4, channels=(4, 8), encoder_channels=(4, 8), patch=1)
TRAIN = ("train", "vae", "--latent", "4", "--images", "64", "--batch", "16", "--threads", "1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE trained for a few steps by the command itself."""
    path = tmp_path_factory.mktemp("runs") / "vae"
    assert main([*TRAIN, "--steps", "8", "--output", str(path)]) == 0
    return path


def tiny_trainer(*, mirror: bool | None = None) -> Trainer:
    return Trainer(digits(48), CONFIG, Training(images=32, steps=4, batch=16, mirror=mirror, seed=3))


def test_a_resumed_training_gives_the_same_weights_to_the_bit(tmp_path: Path) -> None:
    whole_and_resumed(tiny_trainer, tmp_path, stop=2)


def test_a_run_is_loaded_as_a_model_with_its_statistics(run: Path) -> None:
    model = jiio.load(run)
    assert isinstance(model, VAE) and not model.training
    assert model.config.latent == 4
    assert 0 < float(model.pixel_variance) < 1
    assert float(model.generator.tangent.norm()) > 0
    config = json.loads((run / "config.json").read_text())
    assert config["task"] == "vae" and config["training"]["batch"] == 16


def test_evaluate_reports_the_encoder_and_the_search_from_both_starts(run: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    assert main(["evaluate", str(run), "--images", "12", "--draws", "2", "--threads", "1", "--json", str(figures)]) == 0
    report = json.loads(figures.read_text())
    assert report == json.loads((run / "report.json").read_text())
    assert report["images"] == 12 and report["latent"] == 4 and report["training_seconds"] > 0
    for start in ("encoder", "mean"):
        searched = report[f"search_from_{start}"]
        assert set(searched) == {"40", "80", "300"}
        assert searched["300"]["psnr"] > report["encoder"]["psnr"]
    assert set(report["hole"]["psnr_restored"]) == {"mean", "low", "high"}
    distances = [report["frechet"][name] for name in ("samples_mixture", "samples_prior", "encoder", "reconstructions")]
    assert len(set(distances)) == 4 and min(distances) > 0
    assert report["frechet"]["reconstructions"] < report["frechet"]["encoder"]


def test_sample_and_restore_take_the_decoder(run: Path, tmp_path: Path) -> None:
    out, digit = tmp_path / "out", tmp_path / "digit.png"
    assert main(["sample", str(run), "--density", "prior", "--rows", "1", "-o", str(out), "--threads", "1"]) == 0
    assert (out / "samples.png").exists() and (out / "arithmetic.png").exists()
    write_image(load_images("digits", "test")[0], digit)
    assert main(["restore", str(run), str(digit), "--damage", "hole", "-o", str(out), "--threads", "1"]) == 0
    assert (out / "digit-restored.png").exists()


def test_images_are_used_left_to_right_as_well_where_that_is_asked_for() -> None:
    assert torch.equal(tiny_trainer().images.flip(-1), tiny_trainer(mirror=True).images[32:])


def test_fewer_images_than_a_batch_are_refused() -> None:
    with pytest.raises(UserError, match="8 training images are fewer than a batch of 16"):
        Trainer(digits(8), CONFIG, Training(batch=16))
