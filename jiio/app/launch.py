"""Run a training under a progress bar: by itself, or with the other processes of its launcher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jiio.app.run_folder import RunFolder
from jiio.app.table import console
from jiio.app.team import Team, assemble
from jiio.app.training import Trainable, Watch, open_run, run_training

if TYPE_CHECKING:
    from jiio.app.commands import WithRun

LOG_EVERY = 10


def team_of(options: WithRun) -> Team:
    """The processes that do a training."""
    return assemble(options.device, accumulate=options.accumulate)


def train(
    options: WithRun,
    trainer: Trainable[Any, Any],
    config: dict[str, Any],
    *,
    default: Path,
    watches: Sequence[Watch] = (),
) -> dict[str, Any]:
    """A training, from the start or from the run's last checkpoint."""
    from jiio.app.progress import steps_bar

    folder, team = RunFolder(options.output or default), trainer.team
    console.quiet = not team.leads
    if options.tensorboard:
        from jiio.app.scalars import require_tensorboard

        require_tensorboard()
    for problem in open_run(folder, trainer, config, resume=options.resume, overwrite=options.overwrite):
        console.print(f"[yellow]skipped a damaged checkpoint: {problem}[/]")
    if options.tensorboard and team.leads:
        from jiio.app.scalars import Scalars

        watches = [*watches, Watch(LOG_EVERY, Scalars(folder.path / "tensorboard", done=trainer.step).write)]
    several = f"{team.size} processes; " if team.size > 1 else ""
    console.print(f"{several}Ctrl-C saves and leaves")
    figures = run_training(
        folder, trainer, checkpoint_every=options.checkpoint_every, log_every=LOG_EVERY, watches=watches
    )
    steps_bar(figures, total=trainer.steps, label="training", done=trainer.step)
    console.print(f"wrote {folder.path}; next: jiio evaluate {folder.path}")
    return {"run": str(folder.path), "steps": trainer.step}
