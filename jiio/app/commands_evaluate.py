"""`jiio evaluate RUN`, for every kind of model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from jiio.app.commands import SHOWN, WithData, characters_of, images_of, open_model, own_run
from jiio.app.commands_classifier import labelled, read_report, threat_of
from jiio.app.features import Features, features
from jiio.app.progress import images_bar
from jiio.app.run_folder import RunFolder, UserError, user_input
from jiio.app.table import console
from jiio.load import Model
from jiio.models import VAE, Classifier, ContextClassifier, Generator
from jiio.tasks.frechet import features_of
from jiio.tasks.generation import PRIOR
from jiio.tasks.measurement import EVALUATED, damage
from jiio.tasks.ppca import PPCA

Positional = tyro.conf.Positional


@dataclass(frozen=True)
class Evaluate(WithData):
    """How good is a trained model on test images it has not seen?

    A generator: reconstruction and restoration, beside PCA and probabilistic PCA, PSNR and SSIM; Frechet distance of its
    samples. A VAE: the same, and reconstruction by its encoder alone beside the search for latents that a generator gets.
    A classifier: accuracy, clean and under attack, by this project's attacks and by other people's. A model that adapts:
    accuracy on new tasks.

    Examples: jiio evaluate mnist-generator --data-dir DATA
              jiio evaluate mnist-generator --data-dir DATA --damages blur superresolution pixels
              jiio evaluate mnist-classifier --data-dir DATA --images 500
    """

    run: Positional[str] = "digits-generator"
    """Run folder or the name of a packaged model."""
    images: int = 1000
    """Test images, chosen by a fixed seed; 0 for all."""
    draws: int = 3
    """Draws of every damage (generators and VAEs)."""
    damages: tuple[str, ...] = EVALUATED
    """Damages to restore (generators and VAEs): hole, pixels, blur, downsample, superresolution, or noise-0.2 (any level)."""
    features: str | None = None
    """Features of the Frechet distance (generators and VAEs): a TorchScript file, module:function, or a run of a
    classifier; the packaged classifier of the same data otherwise."""
    radius: float | None = None
    """Radius of the attacks; that of the training otherwise (classifiers)."""
    tasks: int = 600
    """Tasks (models that adapt)."""


def evaluate(options: Evaluate) -> dict[str, Any]:
    """`jiio evaluate RUN`."""
    if options.images < 0 or options.draws < 1:
        raise UserError(f"--images must not be negative and --draws at least 1: {options.images}, {options.draws}")
    folder, model, config = open_model(options.run, options.device)
    _refuse_options_of_others(options, model)
    if isinstance(model, Generator):
        return _evaluate_generator(options, folder, model, config)
    if isinstance(model, VAE):
        return _evaluate_vae(options, folder, model, config)
    if isinstance(model, Classifier):
        return _evaluate_classifier(options, folder, model, config)
    return _evaluate_meta(options, folder, model, config)


# The options that an evaluation of each kind of model takes, of those that not all take.
TAKEN: dict[type, tuple[str, ...]] = {
    Generator: ("images", "draws", "damages", "features"),
    VAE: ("images", "draws", "damages", "features"),
    Classifier: ("images", "radius"),
    ContextClassifier: ("tasks",),
}


def _refuse_options_of_others(options: Evaluate, model: Model) -> None:
    """`UserError` for an option that would be ignored."""
    for name in dict.fromkeys(name for names in TAKEN.values() for name in names):
        if name not in TAKEN[type(model)] and getattr(options, name) != getattr(Evaluate, name):
            taken = ", ".join(f"--{name}" for name in TAKEN[type(model)])
            raise UserError(
                f"{options.run} is a {type(model).__name__}, whose evaluation has no --{name}: it takes {taken}"
            )


def _chosen(options: Evaluate, count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[: options.images or count]


def _evaluate_generator(options: Evaluate, folder: Path, model: Generator, config: dict[str, Any]) -> dict[str, Any]:
    from jiio.app import evaluate as evaluation

    train, test = (images_of(config, split, options.data_dir) for split in ("train", "test"))
    test, prior = test[_chosen(options, len(test))], config.get("training", {}).get("prior", PRIOR)
    damages = _damages(options, model)
    extractor = _features(options, config, test)
    baseline = _baseline(train, model.config.latent)
    total = evaluation.evaluated_images(len(test), options.draws, damages)
    with images_bar("evaluating", total=total) as watch:
        figures = evaluation.evaluate(
            model, baseline, test, prior=prior, draws=options.draws, damages=damages, features=extractor,
            seed=options.seed, watch=watch,
        )  # fmt: skip
    report = {"data": config["data"]} | figures
    evaluation.show_report(report)
    if own_run(folder):
        path = RunFolder(folder).write_json("report.json", report)
        picture = evaluation.restoration_picture(
            model, baseline, test[:SHOWN], folder / "restoration.png", damages=damages
        )
        console.print(f"wrote {path} and {picture}")
    return report


def _evaluate_vae(options: Evaluate, folder: Path, model: VAE, config: dict[str, Any]) -> dict[str, Any]:
    from jiio.app import evaluate_vae

    train, test = (images_of(config, split, options.data_dir) for split in ("train", "test"))
    test, damages = test[_chosen(options, len(test))], _damages(options, model.generator)
    extractor = _features(options, config, test)
    baseline = _baseline(train, model.config.latent)
    with images_bar("evaluating", total=evaluate_vae.evaluated_images(len(test), options.draws, damages)) as watch:
        figures = evaluate_vae.evaluate(
            model, baseline, test, draws=options.draws, damages=damages, features=extractor,
            seed=options.seed, watch=watch,
        )  # fmt: skip
    report = {"data": config["data"], "training_seconds": RunFolder(folder).seconds()} | figures
    evaluate_vae.show_report(report, damages)
    if own_run(folder):
        console.print(f"wrote {RunFolder(folder).write_json('report.json', report)}")
    return report


def _baseline(train: torch.Tensor, latent: int) -> PPCA:
    """Probabilistic PCA of the training images; refused where a latent has as many entries as an image has numbers."""
    with user_input():
        return PPCA.fit(train, latent)


def _damages(options: Evaluate, model: Generator) -> tuple[str, ...]:
    """The damages asked for; refused before any work when one is unknown or does not fit the images."""
    with user_input():
        for name in options.damages:
            damage(name)[0].draw(model.config.image_shape, torch.Generator())
    return tuple(dict.fromkeys(options.damages))


def _features(options: Evaluate, config: dict[str, Any], test: torch.Tensor) -> Features | None:
    """The extractor of the Frechet distance, tried on two images before any work; None, with the reason, where there can
    be none."""
    from jiio.app.frechet import LEAST

    found, images = features(options.features, config["data"], device=options.device), len(test)
    if found is None:
        console.print(f"no Frechet distance: the package has no classifier of {config['data']}; --features takes yours")
    elif images < LEAST:
        raise UserError(f"a Frechet distance needs {LEAST} images or more, got --images {images}")
    else:
        with user_input():
            features_of(found.extractor, test[:2], device=options.device)
    return found


def _evaluate_classifier(options: Evaluate, folder: Path, model: Classifier, config: dict[str, Any]) -> dict[str, Any]:
    from jiio.app import evaluate_classifier

    images, labels = labelled(config, "test", options.data_dir)
    rows = _chosen(options, len(images))
    threat = threat_of(config, options.radius)
    count = len(evaluate_classifier.attacks(model, threat))
    with images_bar(f"{count} attacks", total=len(rows) * count) as watch:
        report = evaluate_classifier.evaluate(model, images, labels, threat, rows=rows, seed=options.seed, watch=watch)
    report = {"data": config["data"], "training_seconds": RunFolder(folder).seconds()} | report
    evaluate_classifier.show_report(report)
    if own_run(folder):
        audited = {key: value for key, value in read_report(folder).items() if key == "audit"}
        console.print(f"wrote {RunFolder(folder).write_json('report.json', report | audited)}")
    return report


def _evaluate_meta(options: Evaluate, folder: Path, model: ContextClassifier, config: dict[str, Any]) -> dict[str, Any]:
    from jiio.app import evaluate_meta

    if options.tasks < 2:
        raise UserError(f"--tasks must be at least 2, got {options.tasks}")
    training = config.get("training", {})
    characters = characters_of(config, "test", options.data_dir)
    prior = training.get("prior", evaluate_meta.PRIOR)
    with images_bar("tasks", total=evaluate_meta.evaluated_tasks(options.tasks, len(characters))) as watch:
        report = evaluate_meta.evaluate(
            model, characters.to(options.device), tasks=options.tasks, prior=prior, seed=options.seed, watch=watch
        )
    report = {"data": config["data"], "training_seconds": RunFolder(folder).seconds()} | report
    evaluate_meta.show_report(report)
    if own_run(folder):
        console.print(f"wrote {RunFolder(folder).write_json('report.json', report)}")
    return report
