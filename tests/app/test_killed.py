"""A training killed again and again without warning, and taken up each time, ends with the weights of one left alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from jiio.app.run_folder import RunFolder
from jiio.app.training import open_run, run_training
from tests.app.runs import tiny_trainer

KILLS = 10
STEPS = 30
OPTIONS = {"task": "generation", "steps": STEPS}


def train(path: Path, resume: bool) -> None:
    torch.set_num_threads(1)
    folder, trainer = RunFolder(path), tiny_trainer(steps=STEPS)
    open_run(folder, trainer, OPTIONS, resume=resume, overwrite=False)
    (path / "started").touch()
    for _ in run_training(folder, trainer, checkpoint_every=1, log_every=1):
        pass


def child(path: Path, *, resume: bool) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "sklearn.mixture", "sklearn.datasets"])  # imported once for all children
    (path / "started").unlink(missing_ok=True)
    process = context.Process(target=train, args=(path, resume))
    process.start()
    while not (path / "started").exists():
        assert process.is_alive(), "the training ended before it began"
        time.sleep(0.01)
    return process


def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    untouched = child(whole, resume=False)
    moment = random.Random(0)
    for k in range(KILLS):
        process = child(killed, resume=k > 0)
        time.sleep(moment.uniform(0.0, 0.3))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    process = child(killed, resume=True)
    for last in (process, untouched):
        last.join()
        assert last.exitcode == 0
    expected, found = (load_file(path / "weights.safetensors") for path in (whole, killed))
    assert all((expected[name] == value).all() for name, value in found.items()) and expected.keys() == found.keys()
    lines = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, STEPS + 1))
