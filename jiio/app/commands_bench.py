"""`jiio bench`."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from jiio.app.bench import Case, find_reference, run_case
from jiio.app.bench_cases import adaptation_case, attack_case, generator_cases
from jiio.app.commands import WithData, as_generator, characters_of, images_of, open_model
from jiio.app.commands_classifier import labelled, threat_of
from jiio.app.progress import stages
from jiio.app.run_folder import UserError, user_input, write_json
from jiio.app.table import console
from jiio.load import REFERENCE, find_run, packaged, read_reference
from jiio.models import Classifier, Generator
from jiio.tasks import meta
from jiio.tasks.generation import PRIOR

Positional = tyro.conf.Positional
QUICK = "digits-"  # packaged models that a bench without arguments takes


@dataclass(frozen=True, kw_only=True)
class Bench(WithData):
    """Compare the joint solve with every alternative on this machine: work and time to the same re-solved cost.

    Examples: jiio bench
              jiio bench --full --data-dir DATA
              jiio bench runs/my-generator
    """

    runs: Positional[tuple[str, ...]] = ()
    """Run folders or names of packaged models; the digits models of the package by default."""
    full: bool = False
    """All models of the package, and the runs given."""
    only: tuple[str, ...] = ()
    """Compare just the methods whose names begin with one of these, "joint" for example."""
    repeats: int = 5
    """Timed runs of every method, interleaved."""
    threads: int = 1
    """CPU threads."""
    picture: Path = Path("runs/bench/bench.png")
    """Where the figure goes."""
    keep_reference: bool = False
    """Search the best known costs and every method's settings anew (minutes) and keep them in the run's reference.json."""


def bench(options: Bench) -> dict[str, Any]:
    """`jiio bench`."""
    from jiio.app.bench_report import as_report, figure, show_result

    if options.only and options.keep_reference:
        raise UserError("--keep-reference keeps the settings of every method: leave out --only")
    results = []
    for run in chosen(options):
        with user_input():
            folder = find_run(run)
        kept = read_reference(folder)
        for case in cases(run, options):
            case = restricted(case, options.only)
            with stages(f"{case.problem}, {case.model}") as watch:
                # no cost is known either where z of a sample could not be solved for
                if options.keep_reference or kept.get(case.problem, {}).get("cost") is None:
                    kept[case.problem] = find_reference(case, watch)
                results.append(run_case(case, reference=kept[case.problem], repeats=options.repeats, watch=watch))
            show_result(results[-1])
        if options.keep_reference:
            write_json(folder / REFERENCE, kept)
    console.print(f"figure: {figure(results, options.picture)}")
    machine = {"processor": platform.machine(), "torch": torch.__version__, "threads": options.threads}
    return as_report(results, machine)


def chosen(options: Bench) -> list[str]:
    """The runs to compare on, each once."""
    if options.full:
        return list(dict.fromkeys([*packaged(), *options.runs]))
    return list(dict.fromkeys(options.runs)) or [name for name in packaged() if name.startswith(QUICK)]


def restricted(case: Case, only: tuple[str, ...]) -> Case:
    """The case with the methods that were asked for."""
    if not only:
        return case
    names = [name for name in case.contenders(case.single) if name.startswith(only)]
    if not names:
        raise UserError(
            f"no method begins with {' or '.join(only)}: choose of {', '.join(case.contenders(case.single))}"
        )
    return replace(case, contenders=lambda batch: {name: case.contenders(batch)[name] for name in names})


def cases(run: str, options: Bench) -> Iterator[Case]:
    """The problems of a run."""
    _, found, found_config = open_model(run, options.device)
    model, config = as_generator(found, found_config)
    training = config.get("training", {})
    if isinstance(model, Generator):
        train, test = (images_of(config, split, options.data_dir) for split in ("train", "test"))
        yield from generator_cases(run, model, train, test, prior=training.get("prior", PRIOR))
    elif isinstance(model, Classifier):
        yield attack_case(run, model, labelled(config, "test", options.data_dir), threat_of(config, None))
    else:
        characters = characters_of(config, "test", options.data_dir)
        ways, prior = training.get("ways", 5), training.get("prior", meta.PRIOR)
        yield adaptation_case(run, model, characters, ways=ways, prior=prior)
