"""Where the features of a Frechet distance come from: a classifier of this project, or a network of the user's."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from jiio.app.run_folder import UserError, user_input
from jiio.load import find_run, load, packaged, read_config
from jiio.models import Classifier
from jiio.tasks.frechet import Extractor, pooled_features

CHOICES = "a TorchScript file (features.pt), module:function, or a run of a classifier (mnist-classifier)"


@dataclass(frozen=True)
class Features:
    """An extractor and the name that tables and reports give it."""

    name: str
    extractor: Extractor


def features(given: str | None, data: str, *, device: str = "cpu") -> Features | None:
    """The extractor that `--features` names; without it that of the packaged classifier of the same data, or None."""
    if given is None:
        own = f"{data}-classifier"
        return _of_classifier(own, device) if own in packaged() else None
    if Path(given).is_file():
        return Features(Path(given).name, _of_file(Path(given), device))
    if ":" in given:
        return Features(given, _of_function(given))
    return _of_classifier(given, device)


def _of_classifier(run: str, device: str) -> Features:
    try:
        folder = find_run(run)
    except FileNotFoundError as error:
        raise UserError(f"--features {run}: there is no such file or run; give {CHOICES}") from error
    with user_input():
        model, task = load(folder, device=device), read_config(folder)["task"]
    if not isinstance(model, Classifier):
        raise UserError(f"--features {run}: it is a run of {task}, not of a classifier; give {CHOICES}")
    pooled, needed = pooled_features(model), tuple(model.config.image_shape)

    def extract(images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != needed:
            raise UserError(
                f"--features {run}: it takes images of shape {needed}, these are of {tuple(images.shape[1:])}"
            )
        return pooled(images)

    return Features(folder.name, extract)


def _of_function(path: str) -> Extractor:
    module, _, name = path.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # a file beside the user, as `python -m` would find it
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--features {path}: {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(found):
        raise UserError(f"--features {path}: it is no function of images (batch, channels, height, width) in [0, 1]")
    return cast(Extractor, found)


def _of_file(path: Path, device: str) -> Extractor:
    """TorchScript alone: its archive holds no Python objects, where a pickled module, and an exported program that torch
    can't read otherwise, may run anything when opened."""
    try:
        module: Callable[[Tensor], Any] = _quietly(lambda: torch.jit.load(path, map_location=device).eval())
    except RuntimeError as error:
        raise UserError(f"--features {path}: it is not readable as TorchScript; save it by torch.jit.save") from error

    def extract(images: Tensor) -> Tensor:
        try:
            return _quietly(lambda: module(images))
        except (RuntimeError, torch.jit.Error) as error:
            shape = tuple(images.shape)
            raise UserError(
                f"--features {path}: the network refuses images of shape {shape}; script one that resizes them itself"
            ) from error

    return extract


def _quietly(call: Callable[[], Any]) -> Any:
    """torch calls TorchScript deprecated, but nothing else loads a network without unpickling it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated.*", category=DeprecationWarning)
        return call()
