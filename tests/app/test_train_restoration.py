"""`jiio train restoration`: a generator trained further through a damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jiio.app.main import main
from jiio.app.train_restoration import RestorationTrainer, RestorationTraining
from jiio.load import load
from jiio.models import Generator
from tests.app.runs import digits, tiny_run, whole_and_resumed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run folder."""
    return tiny_run(tmp_path_factory.mktemp("runs") / "tiny").path


def trainer(run: Path, **options: object) -> RestorationTrainer:
    model = load(run)
    assert isinstance(model, Generator)
    chosen = {"steps": 6, "batch": 8, "images": 24, "joint_steps": 30, "refresh_every": 2, "seed": 3} | options
    return RestorationTrainer(model, digits(40), RestorationTraining(**chosen))  # pyright: ignore


def test_the_result_is_a_run_that_evaluate_and_restore_accept(run: Path, tmp_path: Path) -> None:
    output, figures = tmp_path / "out", tmp_path / "figures.json"
    options = ["--steps", "2", "--batch", "8", "--joint-steps", "20", "--output", str(output), "--threads", "1"]
    assert main(["train", "restoration", str(run), "--gradient", "first_order", *options]) == 0
    config = json.loads((output / "config.json").read_text())
    assert config["task"] == "generation" and config["restoration"]["damage"] == "hole"
    assert config["restoration"]["gradient"] == "first_order" and config["restoration"]["run"] == str(run)
    common = ["--threads", "1", "--json", str(figures)]
    assert main(["evaluate", str(output), "--images", "6", "--draws", "1", "--damages", "hole", *common]) == 0
    assert json.loads(figures.read_text())["hole"]["psnr_restored"]["mean"] > 0
    before, after = load(run).state_dict(), load(output).state_dict()
    assert any(not torch.equal(before[name], value) for name, value in after.items() if "equilibrium" in name)
    kept = [name for name in after if name.startswith("density") or name == "residual_variance"]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)


def test_the_exact_gradient_lowers_the_error_of_a_restored_batch(run: Path) -> None:
    made = trainer(run, steps=12, batch=8, images=8, warm_up=1, learning_rate=1e-3, joint_steps=150, refresh_every=4)
    made.damaged = lambda rows, first=made.damaged(torch.arange(8)): first.select(rows)  # one draw of the damage
    losses = [made.advance()["loss"] for _ in range(12)]
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])


def test_a_resumed_training_gives_the_same_weights_to_the_bit(run: Path, tmp_path: Path) -> None:
    whole_and_resumed(lambda: trainer(run, gradient="first_order"), tmp_path, stop=3)


def test_every_epoch_damages_an_image_anew_and_its_own_way(run: Path) -> None:
    made = trainer(run)
    first = made.damaged(torch.tensor([1, 2]))
    assert torch.equal(made.damaged(torch.tensor([2])).y[0], first.y[1])
    made.step = 3
    assert not torch.equal(made.damaged(torch.tensor([1, 2])).y, first.y)


def test_the_model_that_it_begins_with_is_left_as_it_was(run: Path) -> None:
    model = load(run)
    assert isinstance(model, Generator)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = RestorationTrainer(model, digits(16), RestorationTraining(batch=8, steps=1, gradient="first_order"))
    made.advance()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_mistakes_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in [
        ((str(run), "--damage", "rust"), "unknown damage 'rust': choose one of hole, pixels"),
        ((str(run), "--batch", "2000"), "1437 training images are fewer than a batch of 2000"),
        (("digits-classifier",), "is a run of classification, not of a generator"),
    ]:
        arguments = ["train", "restoration", *options, "--output", str(tmp_path / "x"), "--threads", "1"]
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()
