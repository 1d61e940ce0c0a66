"""The models of the package: they load, have a card, stay small, and do what they are for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import jiio
from jiio.data import load_images, load_labels
from jiio.load import find_run, load_weights, packaged, read_config
from jiio.models import Classifier, Generator
from jiio.tasks.generation import reconstruct
from jiio.tasks.metrics import psnr


@pytest.mark.parametrize("name", packaged())
def test_a_packaged_model_loads_and_has_a_card(name: str) -> None:
    model = jiio.load(name)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    card = (find_run(name) / "card.md").read_text()
    assert card.startswith(f"# {name}\n")
    assert "Command: `jiio train" in card and "Measured" in card


def test_the_packaged_models_stay_small() -> None:
    sizes = {name: sum(file.stat().st_size for file in find_run(name).iterdir()) for name in packaged()}
    of = {
        kind: sum(size for name, size in sizes.items() if kind in name)
        for kind in ("generator", "classifier", "omniglot")
    }
    assert of["generator"] < 4e6 and of["classifier"] < 2e6 and of["omniglot"] < 2e6


def test_the_digits_generator_reconstructs() -> None:
    model = jiio.load("digits-generator")
    assert isinstance(model, Generator)
    images = load_images("digits", "test")[:32]
    found, solution = reconstruct(model, images)
    assert bool(solution.converged.all())
    assert psnr(found, images) > 23


def test_the_digits_classifier_classifies() -> None:
    model = jiio.load("digits-classifier")
    assert isinstance(model, Classifier)
    images, labels = load_images("digits", "test"), load_labels("digits", "test")
    with torch.no_grad():
        assert float((model(images).argmax(1) == labels).float().mean()) > 0.97


def test_a_configuration_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"task": "poetry", "data": "digits", "model": {}}')
    with pytest.raises(ValueError, match="no model for the task 'poetry'"):
        jiio.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match="does not describe a model"):
        read_config(tmp_path)


def test_weights_that_do_not_fit_are_refused_by_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(()), "bias": torch.zeros(2)}, path)
    with pytest.raises(
        ValueError, match=r"another model or version: size mismatch for weight: .*torch.Size\(\[2, 3\]\)"
    ):
        load_weights(torch.nn.Linear(3, 2), path)
