"""The problems of `jiio bench`, made from trained models and test data chosen by seed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from jiio import tree
from jiio.app.bench import Batch, Case, Settings
from jiio.app.methods import Handover, Joint, Method, Nested, NestedSteps, TorchDEQ
from jiio.curvature import gauss_newton, inverse_of
from jiio.data.episodes import Episodes
from jiio.load import device_of
from jiio.models import Classifier, ContextClassifier, Generator
from jiio.optimizer import LBFGS, PGD, Adam
from jiio.precondition import Matrix, Rule, Scalar
from jiio.problem import State
from jiio.schedule import Switch
from jiio.solver import Anderson
from jiio.step import Step
from jiio.tasks import meta
from jiio.tasks.attack import JointAttack
from jiio.tasks.attack_problem import attack_problem
from jiio.tasks.generation import RATE, SOLVER, reconstruction, reconstruction_step
from jiio.tasks.latent_model import density, solve_equilibrium, start
from jiio.tasks.measurement import damage, measure
from jiio.tasks.restoration import restoration, restoration_step
from jiio.tasks.threat import Threat

Labelled = tuple[Tensor, Tensor]  # images and their labels

BATCH = 64
TUNED = 32  # further test images that settings are chosen on: on training images and tasks other rates are the best
TASKS = 16
MATRIX_IMAGES = 64
ADAM = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
RATES = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
HISTORIES = (5, 10, 20)
SOLVE_TOLS = (3e-2, 1e-2)  # of a nested method's solves
MIXING = Anderson(6, growth=1.0)  # from the first step; without restarts it does not arrive
RADII = (0.3, 1.0, 3.0, 10.0)  # steps of an attack in radii


def generator_cases(name: str, model: Generator, train: Tensor, test: Tensor, *, prior: float) -> Iterator[Case]:
    """Reconstruction and inpainting of a batch of test images; tuned on others."""
    measured, tuned = rows_of(len(test))
    parts = test[tuned], test[measured], test[measured[:1]]
    first = train[:MATRIX_IMAGES].to(device_of(model))
    x = model.guess(first)
    with torch.no_grad():
        average = reconstruction(model, first, prior=prior)
    matrix = inverse_of(gauss_newton(average, solve_equilibrium(model, x), x).mean(0))
    for problem, make in (("reconstruction", clean), ("inpainting", holed)):
        tuning, measured, single = (make(model, images, prior) for images in parts)
        yield Case(
            problem,
            name,
            tuning,
            measured,
            single,
            contenders=lambda batch: latent_contenders(batch, matrix),
            long=lambda batch: latent_references(batch, matrix),
        )


def rows_of(count: int) -> tuple[Tensor, Tensor]:
    """(what is measured, what settings are chosen on), rows of a test set of `count`; of few the second are of the first."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:BATCH], order[-TUNED:]


def latent_contenders(batch: Batch, matrix: Tensor) -> dict[str, Settings]:
    """`matrix`: the inverse of the model's average Gauss-Newton matrix, which the quasi-Newton methods get too."""
    largest = float(torch.linalg.eigvalsh(torch.linalg.inv(matrix))[-1])
    found = contenders(
        batch,
        default=Joint(batch.step(RATE), SOLVER),
        initial=Matrix(matrix, 1.0),
        published=Joint(published(0.01, at=62, factor=0.3), Anderson(20)),
    )
    found["joint, plain steps"] = {f"rate {r}": Joint(Step(Scalar(r, 1 / largest))) for r in RATES}
    return found


def contenders(batch: Batch, *, default: Joint, initial: Rule, published: Joint) -> dict[str, Settings]:
    """Every way to minimise over a free x. `initial`: what the quasi-Newton methods start from."""
    step = batch.step
    found: dict[str, Settings] = {
        "joint": {"default": default},
        "joint, Picard": {f"rate {r}": Joint(step(r)) for r in RATES},
        "joint, Anderson": {f"rate {r}": Joint(step(r), MIXING) for r in RATES},
        "joint, published settings": {"the paper's": published},
        "nested cold Adam": nested_adam(warm=False),
        "nested warm Adam": nested_adam(warm=True),
        "nested warm L-BFGS": {
            f"history {h}, tol {t}": Nested(LBFGS(h, initial), True, t) for h in HISTORIES for t in SOLVE_TOLS
        },
        "nested warm, our steps": {f"rate {r}, tol {t}": NestedSteps(step(r), t) for r in RATES for t in SOLVE_TOLS},
        "joint, then L-BFGS": {
            f"after {k}": Handover(Joint(default.step), LBFGS(initial=initial), after=k) for k in (5, 10, 20)
        },
    }
    if find_spec("torchdeq"):
        found["TorchDEQ, Adam"] = {f"rate {r}, tol {t}": TorchDEQ(Adam(r), t) for r in ADAM for t in SOLVE_TOLS}
    return found


def published(rate: float | Rule, *, at: int, factor: float) -> Step:
    """The paper's rates: z 0.8, mu 0.6, the input's `rate` cut once by `factor`, and no safeguard."""
    return Step(rate, z=0.8, mu=0.6, schedule=Switch(at=at, factor=factor), lag=None, cut=None)


def nested_adam(*, warm: bool) -> Settings:
    """Rates and tolerances to choose from."""
    return {f"rate {r}, tol {t}": Nested(Adam(r), warm, t) for r in ADAM for t in SOLVE_TOLS}


def nested_pgd(threat: Threat, *, warm: bool) -> Settings:
    """Rates in radii, and tolerances, to choose from."""
    return {f"rate {r}, tol {t}": Nested(PGD(threat.rule(r)), warm, t) for r in RADII for t in SOLVE_TOLS}


def latent_references(batch: Batch, matrix: Tensor) -> tuple[Method, ...]:
    """The long runs behind a reference cost."""
    return Joint(batch.step(RATE), SOLVER), Nested(LBFGS(initial=Matrix(matrix, 1.0)), True, 1e-3)


def attack_case(name: str, model: Classifier, test: Labelled, threat: Threat) -> Case:
    """The strongest attack on a batch of test images within the training's ball; tuned on others."""
    images, labels = test
    rows, tuned = rows_of(len(images))
    tuning, measured, single = (attacked(model, images[part], labels[part], threat) for part in (tuned, rows, rows[:1]))
    return Case(
        "attack",
        name,
        tuning,
        measured,
        single,
        contenders=lambda batch: attack_contenders(batch, threat),
        long=lambda batch: (Joint(batch.step(1.0)), Nested(PGD(threat.rule(1.0)), True, 1e-3)),
    )


def attacked(model: Classifier, images: Tensor, labels: Tensor, threat: Threat) -> Batch:
    """Attacks from the clean images and the model's first z."""
    images, labels = images.to(device_of(model)), labels.to(device_of(model))
    with torch.no_grad():
        problem = attack_problem(model, images, labels, threat)
    z = model.start(images)
    origin = State(z, tree.apply(torch.zeros_like, z), images)
    return Batch(problem, origin, lambda rate: JointAttack(rate=rate).step(threat))


def attack_contenders(batch: Batch, threat: Threat) -> dict[str, Settings]:
    """Quasi-Newton methods have no part here: the ball is active everywhere."""
    plain = {r: Step(threat.rule(r), lag=None, cut=None) for r in RADII}
    found: dict[str, Settings] = {
        "joint": {"default": Joint(batch.step(JointAttack().rate))},
        "joint, no lookahead": {f"rate {r}": Joint(step) for r, step in plain.items()},
        "joint, Anderson": {f"rate {r}": Joint(step, MIXING) for r, step in plain.items()},
        "joint, published settings": {
            "the paper's": Joint(published(threat.rule(0.6), at=50, factor=1 / 3), Anderson(20))
        },
        "nested cold PGD": nested_pgd(threat, warm=False),
        "nested warm PGD": nested_pgd(threat, warm=True),
    }
    if find_spec("torchdeq"):
        found["TorchDEQ, PGD"] = {
            f"rate {r}, tol {t}": TorchDEQ(PGD(threat.rule(r)), t) for r in RADII for t in SOLVE_TOLS
        }
    return found


def adaptation_case(name: str, model: ContextClassifier, test: Tensor, *, ways: int, prior: float) -> Case:
    """Adaptation to tasks of new characters; tuned on others of them."""
    episodes = Episodes(test, ways, 1, 1, seed=0)
    tuning, measured, single = (
        adapted(model, episodes.draw(draw, count), ways, prior) for draw, count in ((1, TASKS), (0, TASKS), (0, 1))
    )
    return Case(
        "adaptation",
        name,
        tuning,
        measured,
        single,
        contenders=lambda batch: adaptation_contenders(batch, float(model.curvature)),
        long=lambda batch: (Joint(batch.step(0.3)), Nested(LBFGS(), True, 1e-3)),
    )


def adapted(model: ContextClassifier, tasks: tuple[Tensor, ...], ways: int, prior: float) -> Batch:
    """Task vectors from 0."""
    support, labels = (part.to(device_of(model)) for part in tasks[:2])
    with torch.no_grad():
        problem = meta.adaptation(model, support, labels, ways, prior=prior)
    return Batch(problem, meta.start(model, support, ways), lambda rate: meta.step(model, rate))


def adaptation_contenders(batch: Batch, curvature: float) -> dict[str, Settings]:
    """`curvature`: the model's, which the quasi-Newton methods get too."""
    return contenders(
        batch,
        default=Joint(batch.step(meta.RATE), meta.SOLVER),
        initial=Scalar(1.0, 1 / curvature),
        published=Joint(published(0.04, at=62, factor=0.25), Anderson(40)),
    )


def clean(model: Generator, images: Tensor, prior: float) -> Batch:
    """Latents of clean images, from the mean of all latents."""
    images = images.to(device_of(model))
    with torch.no_grad():
        problem = reconstruction(model, images, prior=prior)
    return Batch(
        problem, start(model, len(images)), lambda rate: reconstruction_step(model, len(images), prior=prior, rate=rate)
    )


def holed(model: Generator, images: Tensor, prior: float) -> Batch:
    """Latents of images with a hole under one Gaussian, from the mean of all latents: the first half of a restoration,
    where all methods have the same minimum ahead."""
    operator, sigma = damage("hole")
    measurement = measure(operator, images, sigma=sigma, seed=0).to(device_of(model))
    gaussian = density(model).gaussian()
    with torch.no_grad():
        problem = restoration(model, measurement, gaussian)
    return Batch(
        problem, start(model, len(images)), lambda rate: restoration_step(model, measurement, gaussian, rate=rate)
    )
