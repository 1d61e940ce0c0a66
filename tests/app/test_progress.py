"""What is seen of a long command where nobody looks at a terminal."""

from __future__ import annotations

import pytest

from jiio.app.progress import images_bar, stages, steps_bar

STEP = {"loss": 0.5, "accuracy": 0.25, "residual_z": 1e-3}


def test_a_pipe_gets_a_line_at_each_tenth_of_the_images(capsys: pytest.CaptureFixture[str]) -> None:
    with images_bar("attacks", total=60) as watch:
        for count in (1, 4, 1, 3, 20, 31):
            watch(count)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"attacks: {done} of 60" for done in (6, 29, 60)]
    assert lines[0].endswith(" left") and lines[1].endswith(" left") and lines[2].endswith(" s")


def test_a_pipe_is_told_how_long_a_resumed_training_will_take(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter((100.0, 400.0, 700.0))
    monkeypatch.setattr("jiio.app.progress.time.perf_counter", lambda: next(now))
    steps_bar((STEP for _ in range(8)), total=40, label="training", done=28)
    lines = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["300 s, 0:10:00 left", "600 s, 0:05:00 left"]


def test_a_pipe_gets_the_state_of_a_resumed_training(capsys: pytest.CaptureFixture[str]) -> None:
    steps_bar((STEP for _ in range(12)), total=40, label="training", done=28)
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [f"training: {done} of 40" for done in (32, 36, 40)]
    assert lines[0][1:4] == ["loss 0.500", "25 %", "lag 1e-03"]


def test_a_pipe_is_told_of_every_stage_as_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    with stages("another model") as watch:
        assert capsys.readouterr().out == "another model ...\n"
        watch("radii")
        assert capsys.readouterr().out == "radii ...\n"


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    monkeypatch.setattr("jiio.app.progress._Lines.add", lambda *arguments: lines.append(arguments))
    monkeypatch.setattr("jiio.app.progress.console.is_interactive", True)
    with images_bar("attacks", total=2) as watch:
        watch(2)
    steps_bar((STEP for _ in range(1)), total=1, label="training")
    with stages("one") as told:
        told("two")
    assert not lines
