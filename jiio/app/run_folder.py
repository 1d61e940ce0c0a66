"""A run on disk: config.json, metrics.jsonl, checkpoints/, weights.safetensors, report.json."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from jiio.load import CONFIG, WEIGHTS, load_weights

KEPT = 2  # checkpoints kept: the last, and the one before in case it is damaged


class UserError(Exception):
    """A mistake that one sentence explains; the command line prints it and exits with 2."""


@dataclass(frozen=True)
class RunFolder:
    """The files of a run below `path`."""

    path: Path

    def create(self, config: dict[str, Any], *, resume: bool) -> None:
        """Make the folder, or check that the one to resume is of the same configuration."""
        file = self.path / CONFIG
        if resume:
            if not file.is_file():
                raise UserError(f"there is no run to resume in {self.path}")
            if json.loads(file.read_text()) != json.loads(json.dumps(config)):
                raise UserError(
                    f"{self.path} was started with other options; repeat them, or start a new run elsewhere"
                )
            return
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        for old in [*self.path.glob("checkpoints/*"), *self.path.glob("*.jsonl"), *self.path.glob(WEIGHTS)]:
            old.unlink()
        self.write_json(CONFIG, config)

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file whole or not at all."""
        self.path.mkdir(parents=True, exist_ok=True)
        return replace_text(self.path / name, json.dumps(value, indent=2) + "\n")

    def log(self, values: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    def rewind_log(self, step: int) -> None:
        """Drop lines beyond `step`: they will be written again after resuming there."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return
        lines = [
            line for line in file.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step
        ]
        replace_text(file, "".join(line + "\n" for line in lines))

    def save_checkpoint(self, step: int, model: nn.Module, state: dict[str, Any]) -> None:
        """Weights as safetensors and the rest of the training state beside them, each moved into place when whole."""
        folder = self.path / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{step:08d}"
        torch.save(state, folder / f"{name}.tmp")
        os.replace(folder / f"{name}.tmp", folder / f"{name}.state")
        save_weights(model, folder / f"{name}.safetensors")
        for old in sorted(folder.glob("*.safetensors"))[:-KEPT]:
            old.unlink()
            old.with_suffix(".state").unlink(missing_ok=True)

    def load_checkpoint(self, model: nn.Module) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest readable training state, its weights put into `model`, and what was wrong with newer ones."""
        problems: list[str] = []
        for weights in sorted((self.path / "checkpoints").glob("*.safetensors"), reverse=True):
            try:
                load_weights(model, weights)
                return torch.load(weights.with_suffix(".state"), weights_only=True), problems
            except (ValueError, OSError, EOFError, RuntimeError) as error:
                problems.append(f"{weights.name}: {error}")
        return None, problems

    def save_weights(self, model: nn.Module) -> None:
        """The final weights."""
        save_weights(model, self.path / WEIGHTS)


def save_weights(model: nn.Module, path: Path) -> None:
    """Safetensors, moved into place when whole."""
    temporary = path.with_suffix(".part")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, temporary)
    os.replace(temporary, path)


def replace_text(path: Path, text: str) -> Path:
    """Write a text file whole or not at all."""
    temporary = path.with_suffix(path.suffix + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)
    return path
