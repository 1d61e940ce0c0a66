"""Models from disk: a run folder, or the name of a model in the package."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from jiio.models import (
    VAE,
    Classifier,
    ClassifierConfig,
    ContextClassifier,
    ContextConfig,
    Generator,
    GeneratorConfig,
    VAEConfig,
    classifier,
    context_classifier,
    generator,
    vae,
)

WEIGHTS = "weights.safetensors"
CONFIG = "config.json"
Model = Generator | VAE | Classifier | ContextClassifier
REFERENCE = "reference.json"


def packaged() -> list[str]:
    """Names of the models in the package."""
    root = Path(str(files("jiio"))) / "weights"
    return sorted(path.name for path in root.iterdir() if (path / CONFIG).exists()) if root.is_dir() else []


def find_run(run: str | Path) -> Path:
    """The folder of a run or of a packaged model; `FileNotFoundError` with the choices when there is none."""
    folder = Path(run)
    if (folder / CONFIG).is_file():
        return folder
    packed = Path(str(files("jiio"))) / "weights" / str(run)
    if (packed / CONFIG).is_file():
        return packed
    known = ", ".join(packaged()) or "none"
    raise FileNotFoundError(f"no run folder {str(run)!r} with a {CONFIG}; models in the package: {known}")


def read_config(folder: Path) -> dict[str, Any]:
    """The run's configuration; `ValueError` when it is no JSON object."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / CONFIG} is not readable as JSON: {error}") from error
    if (
        not isinstance(config, dict)
        or not {"task", "data", "model"} <= set(config)
        or not isinstance(config["model"], dict)
    ):
        raise ValueError(f"{folder / CONFIG} does not describe a model")
    return config


def read_reference(folder: Path) -> dict[str, dict[str, Any]]:
    """Of each of the run's benchmark problems the best known `cost` and the `settings` that tuning chose, as
    `jiio bench RUN --keep-reference` found them; empty where none were kept."""
    file = folder / REFERENCE
    return json.loads(file.read_text()) if file.is_file() else {}


def fresh(task: str, values: dict[str, Any]) -> Model:
    """The model of a configuration, with fresh weights; `ValueError` for a task that this version does not know."""
    if task == "generation":
        return generator(GeneratorConfig.from_dict(values))
    if task == "vae":
        return vae(VAEConfig.from_dict(values))
    if task == "classification":
        return classifier(ClassifierConfig.from_dict(values))
    if task == "meta":
        return context_classifier(ContextConfig.from_dict(values))
    raise ValueError(f"there is no model for the task {task!r}")


def load(run: str | Path, *, device: str | torch.device = "cpu") -> Model:
    """The model of a run folder or of the package, in evaluation mode.

    Raises `FileNotFoundError` for an unknown run, `ValueError` for unreadable weights.
    """
    folder = find_run(run)
    config = read_config(folder)
    try:
        model = fresh(config["task"], config["model"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} describes a model that this version does not know: {error}") from error
    path = folder / WEIGHTS if (folder / WEIGHTS).exists() else newest_weights(folder)
    load_weights(model, path)
    return model.to(device).eval().requires_grad_(False)


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


def newest_weights(folder: Path) -> Path:
    """The last checkpoint's weights of a run that has not finished."""
    found = sorted((folder / "checkpoints").glob("*.safetensors"))
    if not found:
        raise FileNotFoundError(f"{folder} has no weights: the training has not written a checkpoint yet")
    return found[-1]


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Read safetensors into `model`; `ValueError` when the file is damaged or of another model."""
    try:
        model.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable checkpoint ({error}); it may be cut off") from error
    except RuntimeError as error:
        # torch's first line only says that something differs, the second what
        differing = str(error).splitlines()[:2][-1].strip()
        raise ValueError(f"{path} holds the weights of another model or version: {differing}") from error
