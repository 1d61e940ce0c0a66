from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import jiio
from jiio.app.run_folder import RunFolder, UserError, user_input
from jiio.load import newest_weights
from tests.app.runs import tiny_run


def linear(value: float) -> nn.Linear:
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, value)
    return model


def with_checkpoints(path: Path) -> RunFolder:
    folder = RunFolder(path)
    for step in (1, 2, 3):
        folder.save_checkpoint(step, linear(step), {"step": step})
    return folder


def test_a_saved_model_is_loaded_with_the_same_weights(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path / "run")
    first, second = jiio.load(folder.path), jiio.load(str(folder.path))
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert first.config.latent == 4 and not first.training


def test_the_last_two_checkpoints_are_kept_and_the_last_is_loaded(tmp_path: Path) -> None:
    folder, model = with_checkpoints(tmp_path), linear(0)
    assert sorted(path.stem for path in (tmp_path / "checkpoints").glob("*.safetensors")) == ["00000002", "00000003"]
    state, problems = folder.load_checkpoint(model)
    assert state == {"step": 3} and not problems
    assert model.weight[0, 0].item() == 3


@pytest.mark.parametrize("suffix", [".safetensors", ".state"])
@pytest.mark.parametrize("content", [b"", b"cut off"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, suffix: str, content: bytes) -> None:
    folder, model = with_checkpoints(tmp_path), linear(0)
    (tmp_path / "checkpoints" / "00000003").with_suffix(suffix).write_bytes(content)
    state, problems = folder.load_checkpoint(model)
    assert state == {"step": 2} and model.weight[0, 0].item() == 2
    assert len(problems) == 1 and problems[0].startswith("00000003: ")


def test_a_damaged_checkpoint_takes_no_place_among_those_kept(tmp_path: Path) -> None:
    """Of a training that goes on from the one before and is interrupted ahead of the damaged one's step."""
    folder = RunFolder(tmp_path)
    for step in (10, 20):
        folder.save_checkpoint(step, linear(step), {"step": step})
    (tmp_path / "checkpoints" / "00000020.safetensors").write_bytes(b"cut off")
    folder.save_checkpoint(15, linear(15), {"step": 15})
    assert sorted(path.stem for path in (tmp_path / "checkpoints").glob("*.safetensors")) == ["00000010", "00000015"]
    assert newest_weights(tmp_path).stem == "00000015"


def test_checkpoints_that_are_all_damaged_are_an_error_and_leave_the_model_alone(tmp_path: Path) -> None:
    folder, model = with_checkpoints(tmp_path), linear(0)
    for path in (tmp_path / "checkpoints").glob("*.state"):
        path.write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        folder.load_checkpoint(model)
    assert model.weight[0, 0].item() == 0


def test_a_run_that_is_there_is_not_deleted_by_mistake(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create({"model": {}, "training": {"steps": 1}})
    folder.log({"step": 1})
    with pytest.raises(UserError, match="--resume goes on with it, --overwrite deletes it"):
        folder.create({"model": {}})
    with pytest.raises(UserError, match=r"other options \(training.steps\)"):
        folder.create({"model": {}, "training": {"steps": 2}}, existing="resume")
    with pytest.raises(UserError, match=r"other options \(training.mirror\)"):  # a version before knew no such option
        folder.create({"model": {}, "training": {"steps": 1, "mirror": None}}, existing="resume")
    folder.create({"model": {}, "training": {"steps": 1}}, existing="resume")
    assert (tmp_path / "metrics.jsonl").exists()
    folder.create({"model": {}}, existing="replace")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_log_is_rewound_to_the_checkpoint_and_a_half_written_line_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (10, 20, 30):
        folder.log({"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    folder.rewind_log(20)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20]


def test_the_seconds_of_a_training_are_those_of_its_last_whole_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.seconds() is None
    for step in (1, 2):
        folder.log({"step": step, "seconds": 1.5 * step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "sec')
    assert folder.seconds() == 3.0


def test_figures_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = RunFolder(tmp_path).write_json("report.json", {"a": [math.nan, 1.0], "b": (math.inf,)})
    assert json.loads(path.read_text()) == {"a": [None, 1.0], "b": [None]}
    assert list(tmp_path.iterdir()) == [path]


def test_only_missing_and_damaged_input_becomes_a_sentence() -> None:
    with pytest.raises(UserError, match="no such"), user_input():
        raise FileNotFoundError("no such")
    with pytest.raises(RuntimeError, match="a bug"), user_input():
        raise RuntimeError("a bug")


def test_an_overwritten_run_keeps_nothing_of_the_old_model(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path / "run")
    for name in ("report.json", "reference.json", "diagnose.png", "samples-10.png"):
        (folder.path / name).write_text("old")
    (folder.path / "mine.png").write_text("not the run's")
    folder.create({"task": "generation"}, existing="replace")
    assert sorted(path.name for path in folder.path.iterdir()) == ["checkpoints", "config.json", "mine.png"]
