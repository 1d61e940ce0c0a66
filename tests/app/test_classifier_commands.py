"""`jiio train adversarial`, `evaluate`, `attack` and `audit` on the digits, small."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jiio.app.attack_files import outcome
from jiio.app.evaluate_classifier import OWN, Result, attacks, evaluate, show_report
from jiio.app.main import main
from jiio.app.train_classifier import Trainer, Training, default_config
from jiio.data import load_images, load_labels, read_image, write_image
from jiio.load import load
from jiio.models import Classifier, ClassifierConfig, classifier
from jiio.tasks.attack import JointAttack, attack
from jiio.tasks.threat import Norm, Threat
from tests.app.runs import whole_and_resumed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier trained for a minute's part by the command itself."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    assert (
        main(["train", "adversarial", "--steps", "60", "--attack-steps", "3", "--threads", "1", "--output", str(path)])
        == 0
    )
    return path


def tiny_trainer() -> Trainer:
    images, labels = load_images("digits", "train")[:100], load_labels("digits", "train")[:100]
    return Trainer(
        images, labels, default_config((1, 8, 8), 10), Training(steps=6, batch=16, attack_steps=2, flip=True)
    )


def test_a_resumed_training_gives_the_same_weights_to_the_bit(tmp_path: Path) -> None:
    whole_and_resumed(tiny_trainer, tmp_path, stop=3)


@pytest.mark.parametrize("attack", ["pgd", "none"])
def test_the_baselines_train(attack) -> None:
    trainer = tiny_trainer()
    trainer.training = Training(attack=attack, steps=6, batch=16, attack_steps=2)
    assert trainer.advance()["loss"] > 0


def test_training_learned_something_and_was_logged(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 60
    assert lines[-1]["accuracy"] > 0.3
    assert json.loads((run / "config.json").read_text())["task"] == "classification"


def test_evaluation_has_a_row_for_each_attack_and_is_written(run: Path) -> None:
    assert main(["evaluate", str(run), "--images", "10", "--threads", "1"]) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["images"] == 10
    assert report["clean_all"]["images"] == 360
    assert report["strongest"]["accuracy"] <= report["clean"]["accuracy"]
    for row in report["attacks"].values():
        assert set(row) == {"accuracy", "low", "high", "seconds", "work", "resolved", "median_distance"}
        assert row["accuracy"] >= report["strongest"]["accuracy"]
    assert report["attacks"]["joint"]["work"]["vjp"] > 0
    assert report["attacks"]["joint"]["resolved"] == 1
    assert report["training_seconds"] > 0


def test_an_evaluation_says_once_that_equilibria_can_not_be_solved(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a fresh MDEQ, which is no contraction; every warning would fail the test."""
    torch.manual_seed(0)
    config = ClassifierConfig(image_shape=(1, 8, 8), channels=(8, 16), patch=1, cell="mdeq")
    images, labels = load_images("digits", "test")[:4], load_labels("digits", "test")[:4]
    monkeypatch.setattr("jiio.app.evaluate_classifier.OWN", {"joint": JointAttack(steps=2)})
    monkeypatch.setattr("jiio.app.evaluate_classifier._foolbox", lambda threat: {})
    report = evaluate(classifier(config).eval(), images, labels, Threat("l2", 0.7))
    assert report["attacks"]["joint"]["resolved"] < 1
    show_report(report | {"data": "digits"})
    assert " ".join(capsys.readouterr().out.split()).count("could not be solved to 0.0001") == 1


def test_attacks_of_others_work_on_the_model_in_eval_mode(run: Path) -> None:
    pytest.importorskip("foolbox")
    model = load(run)
    assert isinstance(model, Classifier) and not model.training
    images, labels = load_images("digits", "test")[:40], load_labels("digits", "test")[:40]
    before = model.tol, model.on_failure
    report = evaluate(model, images, labels, Threat("l2", 0.7))
    assert (model.tol, model.on_failure) == before
    accuracy = {name: row["accuracy"] for name, row in report["attacks"].items()}
    others = [value for name, value in accuracy.items() if name.startswith("foolbox")]
    assert len(others) == 3
    # a weak attack of our own would flatter the model: by not one image here, a point is allowed
    assert min(accuracy["joint"], accuracy["joint, margins"]) <= min(others)


@pytest.mark.parametrize("norm, radius", [("l2", 4.0), ("linf", 0.5)])
def test_the_distance_of_the_nearest_wrong_image_is_none_where_there_is_none(norm: Norm, radius: float) -> None:
    pytest.importorskip("foolbox")
    torch.manual_seed(0)
    model = classifier(ClassifierConfig(image_shape=(1, 8, 8), classes=4, channels=(4,), patch=2)).eval()
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = {name: run for name, run in attacks(model, Threat(norm, radius)).items() if name.startswith("foolbox")}
    assert len(found) == 3
    with torch.no_grad():
        model.head.weight.mul_(10)
    for name, run in found.items():
        result = run(images, model(images).argmax(1), lambda images: None)
        assert not bool(result.robust.any())
        assert (result.distance is None) if "PGD" in name else (0 < (result.distance or 0) < radius)
    with torch.no_grad():
        model.head.weight.zero_()  # the same answer everywhere
        answers = model(images).argmax(1)
    result = found["foolbox FMN"](images, answers, lambda images: None)
    assert bool(result.robust.all())
    assert result.distance == math.inf


def test_attacks_that_draw_from_the_global_state_are_seeded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(run)
    assert isinstance(model, Classifier)

    def drawn(images: torch.Tensor, labels: torch.Tensor, watch: object) -> Result:
        return Result(torch.rand(len(images)) > 0.5, seconds=0.0)

    monkeypatch.setattr("jiio.app.evaluate_classifier.attacks", lambda model, threat: {"one": drawn, "two": drawn})
    images, labels = load_images("digits", "test"), load_labels("digits", "test")
    first, again, other = (
        evaluate(model, images, labels, Threat("l2", 0.7), rows=torch.arange(50), seed=seed)["attacks"]
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert first["one"] == first["two"]


def test_autoattack_runs_where_the_model_is_and_by_the_seed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in of its signature: on CUDA and seeded by the clock unless told otherwise."""
    made = []

    class AutoAttack:
        def __init__(
            self, model, norm="Linf", eps=0.3, seed=None, verbose=True, attacks_to_run=(), version="standard",
            is_tf_model=False, device="cuda", log_path=None,
        ) -> None:  # fmt: skip
            made.append({"norm": norm, "eps": eps, "seed": seed, "version": version, "device": str(device)})

        def run_standard_evaluation(self, images: torch.Tensor, labels: torch.Tensor, bs: int = 250) -> torch.Tensor:
            return torch.zeros_like(images)

    monkeypatch.setitem(sys.modules, "autoattack", SimpleNamespace(AutoAttack=AutoAttack, __spec__=object()))
    monkeypatch.setattr("jiio.app.evaluate_classifier.OWN", {})
    monkeypatch.setattr("jiio.app.evaluate_classifier._foolbox", lambda threat: {})
    model = load(run)
    assert isinstance(model, Classifier)
    images, labels = load_images("digits", "test")[:12], load_labels("digits", "test")[:12]
    black = int(model(torch.zeros(1, 1, 8, 8)).argmax())
    report = evaluate(model, images, labels, Threat("l2", 0.7), seed=3)
    assert made == [{"norm": "L2", "eps": 0.7, "seed": 3, "version": "standard", "device": "cpu"}]
    right = (model(images).argmax(1) == labels) & (labels == black)
    assert report["attacks"]["AutoAttack"]["accuracy"] == pytest.approx(float(right.float().mean()))


@pytest.mark.parametrize("method", OWN.values(), ids=OWN)
def test_nothing_survives_a_large_radius(method, run: Path) -> None:
    model = load(run)
    assert isinstance(model, Classifier)
    images, labels = load_images("digits", "test")[:20], load_labels("digits", "test")[:20]
    assert not bool(attack(model, images, labels, Threat("l2", 8.0), method).robust.any())


def test_attack_writes_files_and_a_picture(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "digit.png"
    write_image(load_images("digits", "test")[0], file)
    assert main(["attack", str(run), str(file), "--radius", "3", "-o", str(tmp_path / "out"), "--threads", "1"]) == 0
    assert "->" in capsys.readouterr().out
    attacked = read_image(tmp_path / "out" / "digit-attacked.png", channels=1)
    offset = attacked - read_image(file, channels=1)
    assert 0 < float(offset.norm()) < 3 + 8 / 255
    assert (tmp_path / "out" / "attack.png").exists()


def digits_of(model: Classifier, folder: Path, count: int = 20) -> tuple[list[Path], list[int]]:
    """Test digits as files, and what the model takes them for."""
    x = load_images("digits", "test")[:count]
    paths = [folder / f"{i}.png" for i in range(count)]
    for image, path in zip(x, paths, strict=True):
        write_image(image, path)
    return paths, model(torch.stack([read_image(path, channels=1) for path in paths])).argmax(1).tolist()


def attacked(*arguments: object) -> int:
    return main(["attack", *map(str, arguments), "--threads", "1", "--restarts", "1"])


def test_images_of_the_target_class_are_not_attacked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(run)
    assert isinstance(model, Classifier)
    paths, answers = digits_of(model, tmp_path)
    other = next(i for i in range(20) if answers[i] != answers[0])
    report, out = tmp_path / "report.json", tmp_path / "out"
    files = (run, paths[0], paths[other])
    assert attacked(*files, "--target", answers[0], "--radius", 8, "-o", out, "--json", report) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"already {answers[0]}, not attacked" in shown
    assert f"{answers[other]} -> {answers[0]}" in shown
    assert json.loads(report.read_text())["files"] == [str(out / f"{other}-attacked.png")]
    assert attacked(run, paths[0], "--target", answers[0], "-o", tmp_path / "none") == 2
    assert f"takes every image for {answers[0]} as it is" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_failed_attack_says_its_radius_and_the_distance_is_that_of_the_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, report = tmp_path / "digit.png", tmp_path / "report.json"
    write_image(load_images("digits", "test")[0], file)
    assert attacked(run, file, "--radius", "0.02", "-o", tmp_path / "out", "--json", report) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "within l2 radius 0.02 (try a larger --radius)" in shown
    after, before = (read_image(path, channels=1) for path in (tmp_path / "out" / "digit-attacked.png", file))
    assert json.loads(report.read_text())["distance"] == [pytest.approx(float((after - before).norm()), abs=1e-6)]


@pytest.mark.parametrize(
    "before, after, target, words",
    [
        (3, 5, None, "[bold]3 -> 5[/]"),
        (3, 7, 7, "[bold]3 -> 7[/]"),
        (3, 3, 7, "still 3 within linf radius 0.1 (try a larger --radius)"),
        (3, 5, 7, "3 -> 5, not 7, within linf radius 0.1 (try a larger --radius)"),
    ],
)
def test_only_what_was_asked_for_counts_as_done(before: int, after: int, target: int | None, words: str) -> None:
    assert outcome(before, after, target, Threat("linf", 0.1)) == words


def test_audit_is_added_to_the_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(run), "--images", "12", "--threads", "1"]) == 0
    assert "Gradient masking" in capsys.readouterr().out
    found = json.loads((run / "report.json").read_text())["audit"]
    assert found["images"] == 12
    assert found["threat"] == {"norm": "l2", "radius": 0.7}
    assert found["radius"]["8"] == 0
    assert found["bad_gradients"] == 0


def test_an_evaluation_keeps_the_audit(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "report.json").write_text(json.dumps({"images": 1, "audit": {"clean": 0.9}, "older": 1}))
    monkeypatch.setattr("jiio.app.evaluate_classifier.attacks", lambda model, threat: {})
    assert main(["evaluate", str(copy), "--images", "10", "--threads", "1"]) == 0
    report = json.loads((copy / "report.json").read_text())
    assert report["images"] == 10
    assert report["audit"] == {"clean": 0.9}
    assert "older" not in report


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["attack", "RUN", "none.png"], "none.png"),
        (["attack", "RUN", "FILE", "--radius", "0"], "radius"),
        (["attack", "RUN", "FILE", "--target", "10"], "--target must lie between 0 and 9"),
        (["attack", "digits-generator", "FILE"], "not of a classifier"),
        (["restore", "RUN", "FILE"], "not of a generator"),
        (["attack", "RUN", "FILE", "--seed", str(10**20)], "--seed must lie between"),
        (["train", "adversarial", "--data", "letters"], "data 'letters' has no labels: choose one of digits, mnist"),
        (["train", "adversarial", "--data", "folder:TMP"], "has no labels"),
        (["train", "adversarial", "--clean", "1"], "--clean must lie in [0, 1)"),
        (["train", "adversarial", "--solve-tol", "0"], "--solve-tol must be positive"),
        (["train", "adversarial", "--norm", "linf"], "--norm linf needs a --radius"),
        (["train", "adversarial", "--warm"], "--warm is for --attack pgd"),
        (["train", "adversarial", "--attack", "none", "--warm"], "--warm is for --attack pgd"),
        (["train", "adversarial", "--attack", "none", "--clean", "0.5"], "--clean is a share beside attacked images"),
        (["train", "adversarial", "--data", "cifar10", "--data-dir", "TMP"], "no CIFAR-10"),
        (["audit", "RUN", "--images", "0"], "--images must be at least 1"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], words: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(load_images("digits", "test")[0], tmp_path / "digit.png")
    names = {"RUN": str(run), "FILE": str(tmp_path / "digit.png"), "TMP": str(tmp_path)}
    assert main([names.get(argument, argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
