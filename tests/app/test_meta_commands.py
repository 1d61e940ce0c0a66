"""`jiio train meta`, `evaluate` and `adapt` on made-up characters, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jiio.app.main import main
from jiio.app.train_meta import Training, make_trainer
from jiio.data import write_image
from tests.app.runs import whole_and_resumed
from tests.data.test_omniglot import write_zip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Zips of few characters."""
    root = tmp_path_factory.mktemp("data")
    write_zip(root / "omniglot-py" / "images_background.zip", "background", 8)
    write_zip(root / "omniglot-py" / "images_evaluation.zip", "evaluation", 21, first=8)
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of training by the command itself."""
    path = tmp_path_factory.mktemp("runs") / "meta"
    options = ["--division", "original", "--train-ways", "5", "--steps", "3", "--threads", "1", "--data-dir", str(data)]
    assert main(["train", "meta", *options, "--output", str(path)]) == 0
    return path


def test_training_is_logged(run: Path) -> None:
    assert json.loads((run / "config.json").read_text())["training"]["train_ways"] == 5
    assert "support" in json.loads((run / "metrics.jsonl").read_text().splitlines()[0])


def test_a_resumed_training_gives_the_same_weights_to_the_bit(tmp_path: Path) -> None:
    training = Training(train_ways=5, steps=5, refresh_every=2, adaptation_steps=4)
    whole_and_resumed(lambda: make_trainer("digits", training)[0], tmp_path, stop=3)


def test_evaluation_compares_with_prototypes_and_nested(run: Path, data: Path) -> None:
    assert main(["evaluate", str(run), "--tasks", "2", "--data-dir", str(data), "--threads", "1"]) == 0
    report = json.loads((run / "report.json").read_text())
    for name in ("5way-1shot", "5way-5shot", "20way-1shot"):
        assert set(report[name]) == {"joint", "nested", "unrolled", "prototypes"}
        assert 0 <= report[name]["joint"]["accuracy"]["mean"] <= 1
        assert report[name]["joint"]["support_objective"] <= 1.01 * report[name]["nested"]["support_objective"]


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """Two classes of strokes with examples, and one image to label."""
    generator = torch.Generator().manual_seed(0)
    for name, rows in (("across", True), ("down", False)):
        (tmp_path / "letters" / name).mkdir(parents=True)
        for i in range(2):
            image = torch.ones(1, 28, 28)
            at = int(torch.randint(8, 20, (), generator=generator))
            image[:, at : at + 3, :] = 0
            write_image(image if rows else image.mT, tmp_path / "letters" / name / f"{i}.png")
    image = torch.ones(1, 28, 28)
    image[:, 14:17, :] = 0
    write_image(image, tmp_path / "letters" / "question.png")
    return tmp_path / "letters"


def test_adapt_labels_a_folder(run: Path, letters: Path, tmp_path: Path) -> None:
    picture, figures = tmp_path / "adapted.png", tmp_path / "adapted.json"
    assert main(["adapt", str(run), str(letters), "-o", str(picture), "--json", str(figures), "--threads", "1"]) == 0
    assert picture.exists()
    assert set(json.loads(figures.read_text())["labels"].values()) <= {"across", "down"}


def test_mistakes_are_one_sentence(
    run: Path, letters: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    assert "no folder" in refused("adapt", run, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "at least 2 classes" in refused("adapt", run, tmp_path / "empty")
    write_image(torch.ones(1, 20, 20), letters / "small.png")
    assert "resize it first" in refused("adapt", run, letters)
    for file in letters.glob("*.png"):
        file.unlink()
    assert "no images to label" in refused("adapt", run, letters)
    assert "not of a model that adapts" in refused("adapt", "digits-generator", letters)
    options = ["--data-dir", data, "--division", "original", "--output", tmp_path / "out"]
    assert "more than the 8 classes" in refused("train", "meta", "--ways", "40", *options)
    (tmp_path / "omniglot-py").mkdir()
    (tmp_path / "omniglot-py" / "images_background.zip").write_bytes(b"PK nonsense")
    assert "not a whole zip" in refused("train", "meta", "--division", "original", "--data-dir", tmp_path)
