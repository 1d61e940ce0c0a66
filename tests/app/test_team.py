"""Trainings in several processes, and in parts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jiio.app import train_classifier, train_meta
from jiio.app.main import main
from jiio.app.run_folder import RunFolder, UserError
from jiio.app.team import Team, cpu_share
from jiio.app.train_generation import Trainer, Training, make_trainer
from jiio.app.training import Trainable, open_run, run_training
from jiio.data import load_images, load_labels
from jiio.models import ContextConfig
from tests.app.runs import tiny_trainer

STEPS = 5000
TRAIN = ["train", "generation", "--images", "64", "--batch", "16", "--latent", "4", "--joint-steps", "4"]
TRAIN += ["--steps", str(STEPS), "--threads", "1"]


def worker(rank: int, port: int, output: Path) -> subprocess.Popen[str]:
    """One of two processes, with what `torchrun` tells it."""
    environment = os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "jiio.app.main", *TRAIN, "--output", str(output)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def alone() -> tuple[Trainer, dict]:
    """The same training in one process."""
    return make_trainer("digits", Training(images=64, steps=STEPS, batch=16, joint_steps=4), latent=4)


def test_two_processes_train_as_one_does_and_an_interrupt_of_one_saves_for_all(tmp_path: Path) -> None:
    port = free_port()
    workers = [worker(rank, port, tmp_path) for rank in range(2)]
    log, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 2) and time.monotonic() < deadline:
        assert all(process.poll() is None for process in workers), [process.communicate() for process in workers]
        time.sleep(0.02)
    workers[1].send_signal(signal.SIGINT)
    said = [process.communicate(timeout=120) for process in workers]
    assert [process.returncode for process in workers] == [130, 130], said
    assert "2 processes" in said[0][0] and not said[1][0]
    assert "--resume goes on" in said[0][1] and "--resume" not in said[1][1]

    trainer, config = alone()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        while trainer.step < line["step"]:
            figures = trainer.advance()
        assert figures["loss"] == pytest.approx(line["loss"], rel=1e-4)
        assert figures["psnr"] == pytest.approx(line["psnr"], rel=1e-4)
    resumed, _ = alone()
    assert not open_run(RunFolder(tmp_path), resumed, config, resume=True, overwrite=False)
    while trainer.step < resumed.step:
        trainer.advance()
    assert torch.allclose(trainer.latents, resumed.latents, atol=1e-3)
    assert resumed.advance()["loss"] == pytest.approx(trainer.advance()["loss"], rel=1e-4)


def test_fabric_run_joins_its_processes(tmp_path: Path) -> None:
    script, output = tmp_path / "run.py", tmp_path / "run"
    script.write_text("import sys\nfrom jiio.app.main import main\nsys.exit(main())\n")
    fabric = [
        Path(sys.executable).parent / "fabric",
        "run",
        "--devices=2",
        "--accelerator=cpu",
        f"--main-port={free_port()}",
    ]
    command = [*fabric, script, "--", *TRAIN, "--steps=10", "--output", output]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes") == 1
    trainer, _ = make_trainer("digits", Training(images=64, steps=10, batch=16, joint_steps=4), latent=4)
    losses = [trainer.advance()["loss"] for _ in range(10)]
    lines = [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert lines == pytest.approx([losses[0], losses[9]], rel=1e-4)


def generation(team: Team) -> Trainable:
    trainer = tiny_trainer()
    return Trainer(trainer.images, trainer.model.config, replace(trainer.training, jacobian=1.0), team=team)


def classification(team: Team) -> Trainable:
    images, labels = load_images("digits", "train")[:32], load_labels("digits", "train")[:32]
    training = train_classifier.Training(steps=6, batch=16, attack_steps=2, flip=True)
    config = train_classifier.default_config((1, 8, 8), 10)
    return train_classifier.Trainer(images, labels, config, training, team=team)


def meta(team: Team) -> Trainable:
    characters = torch.rand(4, 4, 1, 28, 28, generator=torch.Generator().manual_seed(0)).round()
    training = train_meta.Training(ways=3, train_ways=3, queries=1, tasks=2, steps=4)
    return train_meta.Trainer(characters, ContextConfig(), training, team=team)


@pytest.mark.parametrize("make", [generation, classification, meta])
def test_parts_that_are_added_up_give_the_step_of_the_whole_batch(make) -> None:
    whole, parts = make(Team()), make(Team(accumulate=2))
    for _ in range(2):
        expected, found = whole.advance(), parts.advance()
        assert found.keys() == expected.keys()
        for name in ("loss", "gradient_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def test_parts_stay_with_the_whole_batch_where_inner_solves_do_not_come_to_rest() -> None:
    training = Training(steps=200, batch=32, warm_up=20, learning_rate=1e-3)
    whole, parts = (make_trainer("digits", training, team=team)[0] for team in (Team(), Team(accumulate=2)))
    for step in range(12):
        assert parts.advance()["loss"] == pytest.approx(whole.advance()["loss"], rel=1e-4), step


def test_the_parts_of_two_processes_cover_the_batch_in_order() -> None:
    seen = []
    for rank in range(2):
        team = Team(accumulate=3)
        team.rank, team.size = rank, 2
        seen += team.parts(12)
    assert [len(part) for part in seen] == [2] * 6
    assert torch.cat(seen).tolist() == list(range(12))


def test_a_batch_that_cannot_be_split_evenly_is_refused_before_there_is_a_run(tmp_path: Path) -> None:
    """A run that was begun would stand in the way of the command that is mended."""
    with pytest.raises(UserError, match=r"batch of 16 is not a multiple of 3: 1 processes times 3 accumulated parts"):
        generation(Team(accumulate=3)).advance()
    for make, batch in ((generation, 16), (classification, 16), (meta, 2)):
        with pytest.raises(UserError, match=f"batch of {batch} is not a multiple of 3"):
            open_run(RunFolder(tmp_path / "run"), make(Team(accumulate=3)), {}, resume=False, overwrite=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="--accumulate must be at least 1"):
        Team(accumulate=0)


def test_processes_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert cpu_share() == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cpu_share() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert cpu_share() == 1


def test_what_is_no_training_is_refused_in_several_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["evaluate", "digits-generator", "--threads", "1"]) == 2
    assert "without a launcher" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["evaluate", "digits-generator", "--threads", "1"]) == 2
    assert not capsys.readouterr().err


def test_an_option_that_the_launcher_swallowed_is_pointed_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("LT_PRECISION", "bf16")
    assert main([*TRAIN, "--output", str(tmp_path)]) == 2
    assert "write -- before `train`" in capsys.readouterr().err


def test_a_watch_sees_the_figures_every_so_many_steps(tmp_path: Path) -> None:
    from jiio.app.training import Watch

    seen: list[float] = []
    list(run_training(RunFolder(tmp_path), tiny_trainer(), watches=[Watch(5, lambda now: seen.append(now["step"]))]))
    assert seen == [5, 10]
