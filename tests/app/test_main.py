from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import jiio
from jiio.app.main import COMMANDS, main
from jiio.data import load_images, read_image, write_image
from tests.app.runs import tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny run folder."""
    return str(tiny_run(tmp_path_factory.mktemp("runs") / "tiny").path)


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    """A test digit as a file."""
    path = tmp_path / "digit.png"
    write_image(load_images("digits", "test")[0], path)
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence with which a command is refused."""
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("jiio: ") and message.count("\n") == 1
    return message


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"jiio {name}" in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*name.split(), "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"jiio {name}" in text and "Example" in text
    assert all(option in text for option in ("--device", "--seed", "--threads", "--json"))


def test_an_unknown_command_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean `jiio evaluate`?" in refused(capsys, "evalute", "x")


def test_an_unknown_option_leaves_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "x", "--bogus", "1"])
    assert stopped.value.code == 2
    assert "--bogus" in capsys.readouterr().err


def test_mistakes_are_one_sentence_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ("train", "generation", "--output", tmp_path / "run")
    assert "no run folder 'nope'" in refused(capsys, "evaluate", "nope")
    assert "unknown data 'cats'" in refused(capsys, *train, "--data", "cats")
    assert "no folder" in refused(capsys, *train, "--data", f"folder:{tmp_path / 'missing'}")
    assert "does not exist" in refused(capsys, *train, "--data", "mnist", "--data-dir", tmp_path / "missing")
    assert "no device 'abacus'" in refused(capsys, *train, "--device", "abacus")
    assert "--threads must be at least 1" in refused(capsys, *train, "--threads", 0)
    assert "there is no run to resume" in refused(capsys, *train, "--resume", "--threads", 1)
    assert "give one of them" in refused(capsys, *train, "--resume", "--overwrite")
    assert not (tmp_path / "run").exists()


def test_unreadable_runs_are_one_sentence_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_run(tmp_path / "run").path
    (folder / "weights.safetensors").write_bytes(b"cut off")
    assert "weights.safetensors is not a readable checkpoint" in refused(capsys, "diagnose", folder)
    (folder / "weights.safetensors").unlink()
    assert "has no weights" in refused(capsys, "diagnose", folder)
    (folder / "config.json").write_text("{")
    assert "not readable as JSON" in refused(capsys, "diagnose", folder)


def test_a_traceback_is_never_shown_by_the_installed_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jiio.app.main", "restore", "nope", str(tmp_path / "missing.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_a_damaged_digit_is_restored_to_a_file(
    run: str, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for damage in ("hole", "pixels", "blur", "downsample", "superresolution", "noise-0.2"):
        out = tmp_path / damage
        assert main(["restore", run, str(digit), "--damage", damage, "-o", str(out), "--threads", "1"]) == 0
        assert read_image(out / "digit-restored.png", channels=1).shape == (1, 8, 8)
        assert (out / "restoration.png").exists()
        assert re.search(r"[01] of 1 converged, after at most \d+ joint steps?", capsys.readouterr().out)


def test_known_pixels_of_a_masked_file_are_kept(run: str, digit: Path, tmp_path: Path) -> None:
    known = torch.ones(1, 8, 8)
    known[:, 2:5, 3:6] = 0
    mask, damaged, figures = tmp_path / "mask.png", tmp_path / "damaged.png", tmp_path / "out.json"
    write_image(known, mask)
    write_image(read_image(digit, channels=1) * known, damaged)
    arguments = ["restore", run, str(damaged), "--mask", str(mask), "-o", str(tmp_path / "out"), "--json", str(figures)]
    assert main([*arguments, "--threads", "1"]) == 0
    restored = read_image(tmp_path / "out" / "damaged-restored.png", channels=1)
    assert torch.allclose(restored * known, read_image(damaged, channels=1), atol=1e-6)
    assert float((restored * (1 - known)).sum()) > 0
    result = json.loads(figures.read_text())
    assert result["files"] == [str(tmp_path / "out" / "damaged-restored.png")]
    assert result["converged"] == [True]


def test_results_never_replace_the_files_that_were_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second file by the name of the first one's result, a file or a mask by the name of the picture."""
    names = ("x", "x-restored", "x-attacked", "restoration", "attack")
    files = {name: tmp_path / f"{name}.png" for name in names}
    for file in files.values():
        write_image(load_images("digits", "test")[0], file)
    before = {file: file.read_bytes() for file in files.values()}
    restoring, attacking = ("restore", "digits-generator"), ("attack", "digits-classifier")
    for arguments in (
        (*restoring, files["x"], files["x-restored"], "--damage", "hole"),
        (*restoring, files["restoration"], "--damage", "hole"),
        (*restoring, files["x"], "--mask", files["restoration"]),
        (*attacking, files["x"], files["x-attacked"]),
        (*attacking, files["attack"]),
    ):
        assert "would be replaced by a result: choose another folder" in refused(capsys, *arguments, "-o", tmp_path)
    for arguments in ((*restoring, files["x"], "--damage", "hole"), (*attacking, files["x"])):
        assert "is a file: --output names the folder" in refused(capsys, *arguments, "-o", files["x"])
    assert {file: file.read_bytes() for file in files.values()} == before


def test_an_option_that_would_be_ignored_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for run, option, kind in (
        ("digits-classifier", "draws", "Classifier"),
        ("digits-generator", "radius", "Generator"),
        ("digits-5way1shot", "images", "ContextClassifier"),
    ):
        message = refused(capsys, "evaluate", run, f"--{option}", 2)
        assert f"{run} is a {kind}, whose evaluation has no --{option}" in message
    unused = ("train", "adversarial", "--attack", "none", "--attack-steps", 3)
    assert "--attack-steps is of an attack" in refused(capsys, *unused)


def test_a_colour_file_is_restored_in_grey_and_other_sizes_refused(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    colour, large = tmp_path / "colour.png", tmp_path / "large.png"
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(colour)
    Image.fromarray(np.zeros((9, 10), dtype=np.uint8)).save(large)
    out = ("-o", tmp_path, "--threads", 1)
    assert main(list(map(str, ("restore", run, colour, "--noise", 0.1, *out)))) == 0
    capsys.readouterr()
    assert "has 10x9 pixels, this model needs 8x8" in refused(capsys, "restore", run, large, "--noise", 0.1, *out)
    assert "has 10x9 pixels, the images 8x8" in refused(capsys, "restore", run, colour, "--mask", large, *out)
    assert "is all black" in refused(capsys, "restore", run, colour, "--mask", colour, *out)
    assert "one after the other" in refused(capsys, "restore", run, colour, colour, "--noise", 0.1, *out)
    assert "say what is damaged" in refused(capsys, "restore", run, colour, *out)
    assert "unknown damage 'rust'" in refused(capsys, "restore", run, colour, "--damage", "rust", *out)
    both = ("--damage", "hole", "--noise", 0.1)
    assert "one or the other" in refused(capsys, "restore", run, colour, *both, *out)
    for noise in ("-1", "nan", "inf"):
        assert "must not be negative" in refused(capsys, "restore", run, colour, f"--noise={noise}", *out)


def test_evaluate_writes_its_report_and_picture(run: str, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    arguments = ["evaluate", run, "--images", "16", "--draws", "2", "--threads", "1", "--json", str(figures)]
    assert main(arguments) == 0
    report = json.loads(figures.read_text())
    assert report == json.loads((Path(run) / "report.json").read_text())
    assert report["images"] == 16 and report["latent"] == 4
    assert set(report["reconstruction"]) == {"40", "80", "300"}
    for damage in ("hole", "noise-0.2", "noise-0.4"):
        assert set(report[damage]["psnr_restored"]) == {"mean", "low", "high"}
    assert (Path(run) / "restoration.png").exists()


def test_diagnose_says_what_to_change(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", run, "--images", "8", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    for part in ("samples converged", "spectral radius", "lag of z and mu", "curvature", "outer gradient", "\n- "):
        assert part in text
    assert "of 4 directions" in text
    assert (Path(run) / "diagnose.png").exists()


def test_sample_writes_both_pictures(run: str, tmp_path: Path) -> None:
    figures = tmp_path / "sample.json"
    assert main(["sample", run, "--rows", "1", "-o", str(tmp_path), "--json", str(figures), "--threads", "1"]) == 0
    assert (tmp_path / "samples.png").exists() and (tmp_path / "interpolation.png").exists()
    assert json.loads(figures.read_text())["samples"] == 10


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["train", "generation", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["train", "generation", "--images", "-5"], "--images must be at least 0, got -5"),
        (["train", "vae", "--steps", "-1"], "--steps must be at least 1, got -1"),
        (["train", "adversarial", "--radius", "-1"], "--radius must be positive, got -1.0"),
        (["train", "generation", "--learning-rate", "-1"], "--learning-rate must be positive, got -1.0"),
        (["train", "meta", "--learning-rate", "nan"], "--learning-rate must be positive, got nan"),
        (["train", "vae", "--jacobian", "-1"], "--jacobian must not be negative, got -1.0"),
        (["train", "vae", "--data", "celeba", "--size", "0"], "--size must be at least 1, got 0"),
        (["train", "generation", "--size", "64"], "--size is for celeba and folders: the images of digits have a size"),
        (["train", "generation", "--device", "mps"], "does not run on the device 'mps': use cpu or cuda"),
        (["train", "meta", "--data", "digits", "--ways", "1"], "tasks need at least 2 ways"),
        (["bench", "digits-generator", "--only", "joint", "--keep-reference"], "leave out --only"),
    ],
)
def test_numbers_and_options_that_cannot_be_meant_are_refused(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_the_trainings_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "jiio train vae" in shown and "jiio restore" not in shown


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"jiio {jiio.__version__}"
