"""The command line: `jiio COMMAND ...`. One row of `COMMANDS` and one module make a command."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import tyro

from jiio import __version__
from jiio.app import (
    commands,
    commands_bench,
    commands_classifier,
    commands_evaluate,
    commands_generation,
    commands_meta,
    commands_restoration,
    commands_sample,
)
from jiio.app.run_folder import UserError, write_json
from jiio.app.team import launched, leads, leave, speaks


class Command(NamedTuple):
    """A command: its frozen options, what it does (returning what --json writes), one line of help."""

    options: type
    run: Callable[[Any], dict[str, Any]]
    help: str


COMMANDS = {
    "demo": Command(commands.Demo, commands.demo, "train on the embedded digits and restore damaged ones"),
    "train generation": Command(
        commands_generation.TrainGeneration, commands_generation.train_generation, "train a generator of images"
    ),
    "train vae": Command(
        commands_generation.TrainVAE, commands_generation.train_vae, "train the generator's baseline, a VAE"
    ),
    "train adversarial": Command(
        commands_classifier.TrainAdversarial,
        commands_classifier.train_adversarial,
        "train a classifier against attacks",
    ),
    "train meta": Command(
        commands_meta.TrainMeta, commands_meta.train_meta, "train a classifier that adapts to few examples"
    ),
    "train restoration": Command(
        commands_restoration.TrainRestoration,
        commands_restoration.train_restoration,
        "train a generator further through the restoration of a damage",
    ),
    "evaluate": Command(commands_evaluate.Evaluate, commands_evaluate.evaluate, "measure a model on test images"),
    "sample": Command(commands_sample.Sample, commands_sample.sample, "draw new images from a generator"),
    "attack": Command(commands_classifier.AttackFiles, commands_classifier.attack_files, "attack your own image files"),
    "adapt": Command(commands_meta.Adapt, commands_meta.adapt, "label your own images from a few examples"),
    "audit": Command(
        commands_classifier.AuditRun, commands_classifier.audit_run, "is a robust classifier really robust"
    ),
    "restore": Command(commands.Restore, commands.restore, "restore your own image files"),
    "bench": Command(commands_bench.Bench, commands_bench.bench, "compare the joint solve with every alternative"),
    "diagnose": Command(commands.Diagnose, commands.diagnose, "why does the inner solve (not) converge"),
}


def usage(beginning: str = "") -> str:
    """The commands whose names begin so, a line each."""
    chosen = {name: command for name, command in COMMANDS.items() if name.startswith(beginning)}
    width = max(map(len, chosen))
    lines = [f"  jiio {name.ljust(width)}  {command.help}" for name, command in chosen.items()]
    return "\n".join(
        [
            "jiio: optimise the inputs of equilibrium networks, and train through it.",
            "",
            *lines,
            "",
            "`jiio COMMAND --help` explains a command, `jiio --version` says which jiio this is. Start with: jiio demo",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 when done, 2 for a mistake in what was asked, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"jiio {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    name = next((name for name in COMMANDS if arguments[: len(name.split())] == name.split()), None)
    if name is None:
        if arguments in (["train"], ["train", "-h"], ["train", "--help"]):
            print(usage("train "))
            return 0
        given = " ".join(arguments[:2]) if arguments[0] == "train" else arguments[0]
        near = difflib.get_close_matches(given, COMMANDS, n=1)
        hint = f"did you mean `jiio {near[0]}`?" if near else "`jiio --help` lists the commands."
        return _refuse(f"there is no command {given!r}; {hint}")
    command = COMMANDS[name]
    options = tyro.cli(command.options, prog=f"jiio {name}", args=arguments[len(name.split()) :])
    try:
        prepare(options)
        result = command.run(options)
        if options.json is not None and leads():
            write_json(options.json, result)
    except UserError as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(f"{error.filename or 'a file'}: {error.strerror or error}")
    except KeyboardInterrupt as interrupt:
        if speaks():
            print(f"jiio: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130
    finally:
        leave()
    return 0


# The least value of the options that count something; 0 images are all of them.
LEAST = {
    "threads": 1,
    "steps": 1,
    "batch": 1,
    "images": 0,
    "latent": 1,
    "joint_steps": 1,
    "attack_steps": 1,
    "tasks": 1,
    "draws": 1,
    "restarts": 1,
    "rows": 1,
    "repeats": 1,
    "checkpoint_every": 1,
    "samples_every": 0,
    "size": 1,
}
POSITIVE = ("radius", "learning_rate", "solve_tol")
LARGEST_SEED = 2**32  # seeds are multiplied, and torch takes no more than 64 bits


def prepare(options: commands.Common) -> None:
    """Set the threads; `UserError` for numbers that can't be meant, a device that this machine has not, and for several
    processes where one does all."""
    if launched() > 1 and not isinstance(options, commands.WithRun):
        raise UserError("only trainings run in several processes: start this command without a launcher")
    for name, least in LEAST.items():
        value = getattr(options, name, None)
        if isinstance(value, int) and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if isinstance(options, commands.WithRun) and options.resume and options.overwrite:
        raise UserError("--resume goes on with a run and --overwrite deletes it: give one of them")
    for name in POSITIVE:
        if (value := getattr(options, name, None)) is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if (penalty := getattr(options, "jacobian", None)) is not None and not penalty >= 0:
        raise UserError(f"--jacobian must not be negative, got {penalty}")
    if abs(options.seed) > LARGEST_SEED:
        raise UserError(f"--seed must lie between {-LARGEST_SEED} and {LARGEST_SEED}, got {options.seed}")
    torch.set_num_threads(options.threads)
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise UserError(f"there is no device {options.device!r}: use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"jiio does not run on the device {options.device!r}: use cpu or cuda")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"torch finds no CUDA device {device.index or 0} on this machine: use --device cpu")
        if device.index is not None:
            torch.cuda.set_device(device)  # clocks wait for this one


def _refuse(sentence: str) -> int:
    if speaks():
        print(f"jiio: {' '.join(sentence.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
