"""A disk that is full while a training writes: the system refuses to write a file beyond a limit."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from jiio.app.main import main
from jiio.app.run_folder import RunFolder, UserError
from jiio.app.training import run_training
from tests.app.runs import tiny_trainer
from tests.app.test_run_folder import linear, with_checkpoints

CHECKPOINT = 20_000  # bytes; config.json and metrics.jsonl stay below


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_disk_that_fills_up_leaves_the_last_checkpoints_and_no_half_written_file(tmp_path: Path) -> None:
    folder, trainer = RunFolder(tmp_path), tiny_trainer()
    figures = run_training(folder, trainer, checkpoint_every=1)
    next(figures), next(figures)
    before = files(tmp_path)
    with files_of_at_most(CHECKPOINT), pytest.raises(UserError, match=r"can't write to .*: File too large; .*--resume"):
        next(figures)
    assert files(tmp_path) == before and len(before) == 4
    resumed = tiny_trainer()
    state, problems = folder.load_checkpoint(resumed.model)
    assert state is not None and state["step"] == 2 and not problems


def test_weights_that_find_no_room_take_the_state_beside_them_away(tmp_path: Path) -> None:
    folder = with_checkpoints(tmp_path)
    before = files(tmp_path)
    with files_of_at_most(CHECKPOINT), pytest.raises(UserError):
        folder.save_checkpoint(4, torch.nn.Linear(100, 100), {"step": 4})
    assert files(tmp_path) == before


def test_the_command_says_so_in_one_sentence_and_leaves_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--images", "32", "--batch", "8", "--joint-steps", "2", "--steps", "4", "--checkpoint-every", "2"]
    with files_of_at_most(CHECKPOINT):
        assert main(["train", "generation", *small, "--threads", "1", "--output", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"jiio: can't write to {tmp_path}") and message.count("\n") == 1
    assert not files(tmp_path)


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("sync"), sync(file))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(Path(b).suffix), replace(a, b))[1])
    RunFolder(tmp_path).save_checkpoint(1, linear(1), {"step": 1})
    assert done == ["sync", ".state", "sync", "sync", ".safetensors", "sync"]


def test_what_a_killed_training_left_half_written_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    folder = with_checkpoints(tmp_path)
    for left in ("00000004.state", "00000004.safetensors.part"):
        (tmp_path / "checkpoints" / left).write_bytes(b"cut off")
    folder.save_checkpoint(5, linear(5), {"step": 5})
    assert files(tmp_path) == [f"0000000{step}.{kind}" for step in (3, 5) for kind in ("safetensors", "state")]


@pytest.mark.parametrize("suffix", [".safetensors", ".state"])
def test_a_flipped_bit_in_a_checkpoint_is_noticed(tmp_path: Path, suffix: str) -> None:
    folder, model = with_checkpoints(tmp_path), linear(0)
    path = (tmp_path / "checkpoints" / "00000003").with_suffix(suffix)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    state, problems = folder.load_checkpoint(model)
    assert state == {"step": 2} and model.weight[0, 0].item() == 2
    assert problems == ["00000003: damaged or cut off: its checksum is wrong"]
