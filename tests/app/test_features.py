"""`--features`: a TorchScript file, a function of the user's, or a classifier of this project."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from jiio.app.features import features
from jiio.app.run_folder import UserError
from tests.app.runs import tiny_run


def scripted(path: Path) -> Path:
    """A network in TorchScript: four row means."""
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d((4, 1)), torch.nn.Flatten())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(network).save(str(path))
    return path


def test_the_packaged_classifier_of_the_same_data_is_the_default() -> None:
    found = features(None, "digits")
    assert found is not None and found.name == "digits-classifier"
    assert found.extractor(torch.zeros(2, 1, 8, 8)).shape == (2, 48)
    assert features(None, "faces64") is None


def test_a_torchscript_file_gives_features(tmp_path: Path) -> None:
    found = features(str(scripted(tmp_path / "rows.pt")), "digits")
    assert found is not None and found.name == "rows.pt"
    assert torch.allclose(found.extractor(torch.full((3, 1, 8, 8), 0.5)), torch.full((3, 4), 0.5))
    with pytest.raises(UserError, match=r"rows.pt.* refuses images of shape"):
        found.extractor(torch.zeros(3))


def test_a_function_of_the_users_own_file_gives_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_features.py").write_text("def means(images):\n    return images.mean((2, 3))\n\nlength = 3\n")
    monkeypatch.chdir(tmp_path)
    found = features("my_features:means", "digits")
    assert found is not None and found.name == "my_features:means"
    assert found.extractor(torch.ones(2, 3, 4, 4)).tolist() == [[1.0] * 3] * 2
    for given, message in [
        ("my_features:medians", "no attribute 'medians'"),
        ("my_features:length", "is no function of images"),
        ("no_such_module:f", "No module named 'no_such_module'"),
    ]:
        with pytest.raises(UserError, match=message):
            features(given, "digits")


def test_what_gives_no_features_is_refused(tmp_path: Path) -> None:
    generator = tiny_run(tmp_path / "run").path
    with pytest.raises(UserError, match="is a run of generation, not of a classifier"):
        features(str(generator), "digits")
    with pytest.raises(UserError, match="no such file or run; give a TorchScript file"):
        features("inception", "digits")
    pickled = tmp_path / "pickled.pt"
    torch.save(torch.nn.Linear(2, 2), pickled)  # a whole module, whose opening runs what it holds
    with pytest.raises(UserError, match="not readable as TorchScript"):
        features(str(pickled), "digits")
