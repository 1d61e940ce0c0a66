"""What a training shows while it runs: TensorBoard's curves, pictures of samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jiio.app.main import main
from jiio.app.scalars import Scalars
from jiio.app.training_samples import draw_samples
from jiio.data import read_image
from tests.app.runs import tiny_trainer

TRAIN = [
    "train",
    "generation",
    "--images",
    "32",
    "--batch",
    "8",
    "--latent",
    "4",
    "--joint-steps",
    "2",
    "--threads",
    "1",
]


def test_tensorboard_gets_every_figure_and_forgets_steps_that_are_done_again(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = Scalars(tmp_path, done=0)
    for step in (10, 20, 30):
        first.write({"step": step, "loss": 1.0 / step, "psnr": float(step)})
    first.writer.close()
    again = Scalars(tmp_path, done=20)
    again.write({"step": 30, "loss": 7.0, "psnr": 3.0})
    again.writer.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "psnr"}
    assert [(event.step, event.value) for event in events.Scalars("loss")][1:] == [(20, pytest.approx(0.05)), (30, 7.0)]


def test_tensorboard_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jiio.app.scalars.find_spec", lambda name: None)
    assert main([*TRAIN, "--tensorboard", "--output", str(tmp_path / "run")]) == 2
    assert "pip install 'jiio[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_training_leaves_curves_and_pictures_and_overwriting_deletes_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    output = ["--output", str(tmp_path), "--threads", "1"]
    assert main([*TRAIN, *output, "--steps", "4", "--tensorboard", "--samples-every", "2"]) == 0
    assert sorted(path.name for path in tmp_path.glob("samples-*")) == ["samples-2.png", "samples-4.png"]
    assert list((tmp_path / "tensorboard").iterdir())
    assert read_image(tmp_path / "samples-4.png", channels=1).std() > 0.05
    assert main([*TRAIN, *output, "--steps", "2", "--overwrite", "--samples-every", "0"]) == 0
    assert not list(tmp_path.glob("samples-*")) and not list(tmp_path.glob("tensorboard/*"))


def test_a_picture_changes_nothing_of_the_training(tmp_path: Path) -> None:
    watched, plain = tiny_trainer(), tiny_trainer()
    for trainer in (watched, plain):
        for _ in range(3):
            trainer.advance()
    state = torch.get_rng_state()
    draw_samples(watched, tmp_path / "samples-3.png")
    assert torch.equal(state, torch.get_rng_state())
    assert watched.advance() == plain.advance()
    for a, b in zip(watched.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_options_that_make_no_sense_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, value, sentence in (
        ("--samples-every", "-1", "must be at least 0"),
        ("--checkpoint-every", "0", "at least 1"),
        ("--accumulate", "0", "at least 1"),
        ("--accumulate", "3", "not a multiple of 3"),
    ):
        assert main([*TRAIN, f"{option}={value}", "--output", str(tmp_path / "run")]) == 2
        assert sentence in capsys.readouterr().err
