"""A run on disk: config.json, metrics.jsonl, checkpoints/, weights.safetensors, report.json."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors.torch import save as serialize
from torch import nn

from jiio.load import CONFIG, REFERENCE, WEIGHTS, load_weights

KEPT = 2  # checkpoints kept: the last, and the one before in case it is damaged


class UserError(Exception):
    """A mistake that one sentence explains; the command line prints it and exits with 2."""


@contextmanager
def user_input() -> Iterator[None]:
    """What readers and loaders say about missing or damaged input, as a `UserError`. For their calls alone: an error of
    the numerical work keeps its traceback."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error


# What trainings and other commands write into a run's folder, beside its weights and its reference of a benchmark.
WRITTEN = (
    "checkpoints/*",
    "tensorboard/*",
    "*.jsonl",
    "report.json",
    "samples-*.png",
    "diagnose.png",
    "restoration.png",
)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What stops files from being written (a full disk, a missing right), as a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"can't write to {folder}: {error.strerror or error}; what was saved there before is intact: make room, then "
            "the same command with --resume goes on"
        ) from error


@dataclass(frozen=True)
class RunFolder:
    """The files of a run below `path`."""

    path: Path

    def create(self, config: dict[str, Any], *, existing: Literal["refuse", "replace", "resume"] = "refuse") -> None:
        """Make the folder. A run that is there already is refused, replaced, or gone on with, which needs the same
        configuration."""
        file = self.path / CONFIG
        if existing == "resume":
            self._check_same(config)
            return
        if existing == "refuse" and file.is_file():
            raise UserError(f"{self.path} holds a run already: --resume goes on with it, --overwrite deletes it")
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        for pattern in (*WRITTEN, REFERENCE, WEIGHTS):
            for old in self.path.glob(pattern):
                old.unlink()
        self.write_json(CONFIG, config)

    def _check_same(self, config: dict[str, Any]) -> None:
        file = self.path / CONFIG
        if not file.is_file():
            raise UserError(f"there is no run to resume in {self.path}")
        with user_input():
            old, new = json.loads(file.read_text()), json.loads(json.dumps(config))
        if old != new:
            changed = ", ".join(differing(old, new))
            raise UserError(
                f"{self.path} was started with other options ({changed}): repeat them, or start a new run elsewhere"
            )

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file whole or not at all."""
        return write_json(self.path / name, value)

    def log(self, values: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(_finite(values), allow_nan=False) + "\n")

    def rewind_log(self, step: int) -> None:
        """Drop lines beyond `step`: they will be written again after resuming there."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return
        lines = [line for line in _whole_lines(file) if json.loads(line)["step"] <= step]
        replace_text(file, "".join(line + "\n" for line in lines))

    def seconds(self) -> float | None:
        """Of the training by its log, resumed or not; None without one."""
        file = self.path / "metrics.jsonl"
        lines = _whole_lines(file) if file.is_file() else []
        return json.loads(lines[-1]).get("seconds") if lines else None

    def save_checkpoint(self, step: int, model: nn.Module, state: dict[str, Any]) -> None:
        """Weights as safetensors and, before them, the rest of the training state with a checksum of both."""
        folder = self.path / "checkpoints"
        weights, buffer = serialized(model), io.BytesIO()
        torch.save(state, buffer)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{step:08d}.safetensors"
            try:
                replace_bytes(file.with_suffix(".state"), checksum(weights, buffer.getvalue()) + buffer.getvalue())
                replace_bytes(file, weights)
            finally:
                # what lies beyond was damaged, or the training would have gone on from there
                whole = sorted(path.stem for path in folder.glob("*.safetensors") if path.stem <= file.stem)
                kept = whole[-KEPT:]
                for other in [path for path in folder.iterdir() if path.stem not in kept]:
                    other.unlink()

    def load_checkpoint(self, model: nn.Module) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest readable training state, its weights put into `model`, and what was wrong with newer ones.

        None when nothing was saved yet; `UserError` when nothing that was saved can be read.
        """
        problems: list[str] = []
        for weights in sorted((self.path / "checkpoints").glob("*.safetensors"), reverse=True):
            try:
                # the state first: weights without it must not get into the model
                state = _read_state(weights)
                load_weights(model, weights)
                return state, problems
            except (ValueError, OSError, EOFError, RuntimeError, UnpicklingError) as error:
                problems.append(f"{weights.stem}: {(str(error) or 'empty file').splitlines()[0]}")
        if problems:
            raise UserError(f"no checkpoint in {self.path} can be read ({'; '.join(problems)}): start with --overwrite")
        return None, problems

    def save_weights(self, model: nn.Module) -> None:
        """The final weights."""
        with writing(self.path):
            replace_bytes(self.path / WEIGHTS, serialized(model))


def _whole_lines(log: Path) -> list[str]:
    """All but one that was cut off while it was written."""
    return [line for line in log.read_text().splitlines() if line.endswith("}")]


def _read_state(weights: Path) -> dict[str, Any]:
    """The training state beside some weights; `ValueError` where either is not what was saved."""
    stored = weights.with_suffix(".state").read_bytes()
    found, content = stored[:CHECKSUM], stored[CHECKSUM:]
    if found != checksum(weights.read_bytes(), content):
        raise ValueError("damaged or cut off: its checksum is wrong")
    return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


CHECKSUM = 32  # bytes


def checksum(*contents: bytes) -> bytes:
    """SHA-256 of some contents, one after the other."""
    found = hashlib.sha256()
    for content in contents:
        found.update(content)
    return found.digest()


def serialized(model: nn.Module) -> bytes:
    """The weights as safetensors."""
    return serialize({name: value.contiguous() for name, value in model.state_dict().items()})


def replace_bytes(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all: its content is on the disk before it takes the name."""
    temporary = path.with_suffix(path.suffix + ".part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder can't be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return path


def replace_text(path: Path, text: str) -> Path:
    """Write a text file whole or not at all."""
    return replace_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> Path:
    """Write a JSON file whole or not at all; figures that are not finite, which JSON has not, become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return replace_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def differing(old: Any, new: Any, name: str = "") -> list[str]:
    """The dotted names of entries that differ between two JSON values.

    >>> differing({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    ['b.c']
    """
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [name]
    keys, absent = [*old, *(key for key in new if key not in old)], object()  # which null is not
    return [
        part
        for key in keys
        for part in differing(old.get(key, absent), new.get(key, absent), f"{name}.{key}" if name else key)
    ]
