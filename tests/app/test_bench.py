"""`jiio bench`: every method is a row, ratios are of the hardest target reached, figures are written."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from jiio.app import bench
from jiio.app.bench_cases import adaptation_case, attack_case, rows_of
from jiio.app.bench_report import figure
from jiio.app.commands_bench import Bench, chosen
from jiio.app.main import main
from jiio.load import packaged
from jiio.models import ClassifierConfig, ContextConfig, classifier, context_classifier
from jiio.tasks.threat import Threat
from tests.app.runs import tiny_run


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "STEPS", 8)
    monkeypatch.setattr(bench, "TUNING_STEPS", 2)
    monkeypatch.setattr(bench, "REFERENCE_STEPS", 20)
    monkeypatch.setattr("jiio.app.bench_cases.ADAM", (0.1,))
    monkeypatch.setattr("jiio.app.bench_cases.BATCH", 4)
    monkeypatch.setattr("jiio.app.bench_cases.TASKS", 2)


JOINT = {"joint", "joint, Anderson", "joint, published settings"}
FREE = JOINT | {
    "joint, Picard",
    "nested cold Adam",
    "nested warm Adam",
    "nested warm L-BFGS",
    "nested warm, our steps",
    "joint, then L-BFGS",
}
ATTACK = JOINT | {"joint, no lookahead", "nested cold PGD", "nested warm PGD"}
OTHERS = {name for name in ("TorchDEQ, Adam", "TorchDEQ, PGD") if find_spec("torchdeq")}


def methods_of(rows: list[dict[str, Any]]) -> set[str]:
    return {line["method"] for line in rows}


def row(method: str, share: str, work: float | None) -> dict[str, Any]:
    return {"method": method, "share": share, "work": work, "seconds": work, "reached": work is not None}


def test_ratios_are_those_of_the_hardest_target_that_both_reach() -> None:
    rows = [
        row("joint", "1.5", 10.0), row("joint", "1.2", 20.0), row("joint", "1.05", None),
        row("nested cold Adam", "1.5", 20.0), row("nested cold Adam", "1.2", 100.0), row("nested cold Adam", "1.05", 300.0),
        row("nested warm Adam", "1.5", 15.0), row("nested warm Adam", "1.2", None), row("nested warm L-BFGS", "1.5", 12.0),
    ]  # fmt: skip
    found = bench.summary(rows)
    assert found["cold_work_ratio"] == 5.0
    assert found["warm_work_ratio"] == pytest.approx(1.2)
    assert bench.summary([row("joint", "1.5", 1.0)])["cold_work_ratio"] is None


def test_the_command_writes_rows_summary_step_cost_and_a_figure(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "tiny").path
    figures, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ["--repeats", "1", "--json", str(figures), "--picture", str(picture), "--keep-reference"]
    assert main(["bench", str(run), *options]) == 0
    report = json.loads(figures.read_text())
    assert picture.exists()
    assert set(report["summary"]) == {"reconstruction", "inpainting"} == set(report["step_cost"])
    wanted = {"problem", "model", "method", "target", "reached", "seconds", "f", "vjp", "cost_grad", "repeats"}
    assert all(wanted <= set(line) for line in report["rows"])
    assert methods_of(report["rows"]) == FREE | {"joint, plain steps"} | OTHERS - {"TorchDEQ, PGD"}
    kept = json.loads((run / "reference.json").read_text())
    assert set(kept) == {"reconstruction", "inpainting"}
    assert kept["inpainting"]["cost"] == report["reference_cost"]["inpainting"]
    assert kept["inpainting"]["settings"]["nested cold Adam"] == report["settings"]["inpainting"]["nested cold Adam"]


def measured(case: bench.Case) -> dict[str, Any]:
    reference = bench.find_reference(case, watch=lambda name: None)
    return bench.run_case(case, reference=reference, repeats=1, watch=lambda name: None)


def test_an_attack_is_compared_with_pgd() -> None:
    torch.manual_seed(0)
    model = classifier(ClassifierConfig(image_shape=(1, 8, 8), classes=3, channels=(4,), patch=2)).eval()
    model.requires_grad_(False)
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 3
    found = measured(attack_case("tiny", model, (images, labels), Threat("l2", 0.5)))
    assert methods_of(found["rows"]) == ATTACK | OTHERS - {"TorchDEQ, Adam"}
    assert found["reference_cost"] < 0
    assert any(line["method"] == "joint" and line["reached"] for line in found["rows"])
    assert any(line["method"] == "nested cold PGD" and line["reached"] for line in found["rows"])


def test_an_adaptation_is_compared_with_nested_methods() -> None:
    torch.manual_seed(0)
    config = ContextConfig(image_shape=(1, 8, 8), margin=0, channels=(4,), patch=2, width=8, film=2, features=3)
    model = context_classifier(config).eval().requires_grad_(False)
    model.curvature.fill_(0.1)
    images = torch.rand(6, 3, 1, 8, 8)
    found = measured(adaptation_case("tiny", model, images, ways=2, prior=0.02))
    assert methods_of(found["rows"]) == FREE | OTHERS - {"TorchDEQ, PGD"}
    assert set(found["step_cost"]) == {"1", "2"}


def test_settings_are_chosen_on_other_images_than_are_measured() -> None:
    measured_on, tuned_on = rows_of(360)
    assert len(measured_on) > 0 and len(tuned_on) > 0
    assert not set(measured_on.tolist()) & set(tuned_on.tolist())


def test_the_figure_names_methods_that_reached_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr("jiio.app.bench_report.save", lambda canvas, path: shown.append(canvas) or path)
    rows = [
        {
            "method": method,
            "share": "1.5",
            "reached": reached,
            **dict.fromkeys(("work", "seconds", "fastest", "slowest"), 1.0),
        }
        for method, reached in (("joint", True), ("joint, published settings", False))
    ]
    figure([{"problem": "inpainting", "model": "tiny", "rows": rows}], tmp_path / "bench.png")
    labels = [text.get_text() for text in shown[0].axes[1].get_legend().get_texts()]
    assert set(labels) == {"joint", "joint, published settings: no target reached"}


def test_a_comparison_can_be_restricted_to_some_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path / "tiny").path
    figures, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    options = [
        "--repeats",
        "1",
        "--json",
        str(figures),
        "--picture",
        str(picture),
        "--only",
        "joint, P",
        "joint, plain",
    ]
    assert main(["bench", str(run), *options]) == 0
    assert methods_of(json.loads(figures.read_text())["rows"]) == {"joint, Picard", "joint, plain steps"}
    assert main(["bench", str(run), "--only", "newton"]) == 2
    assert "no method begins with newton" in capsys.readouterr().err


@pytest.mark.parametrize(
    "runs, full, wanted",
    [
        ((), False, ["digits-5way1shot", "digits-classifier", "digits-generator"]),
        ((), True, packaged()),
        (("a", "b", "a"), False, ["a", "b"]),
        (("a", "mnist-generator"), True, [*packaged(), "a"]),
    ],
    ids=["quick", "full", "runs", "full and runs"],
)
def test_a_full_bench_takes_the_runs_given_too(runs: tuple[str, ...], full: bool, wanted: list[str]) -> None:
    assert chosen(Bench(runs=runs, full=full)) == wanted
