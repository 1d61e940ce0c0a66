"""The problems of `jiio bench`, made from trained models and test data chosen by seed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from jiio.app.bench import Batch, Case, Settings
from jiio.app.methods import Handover, Joint, Method, Nested, TorchDEQ
from jiio.curvature import gauss_newton, inverse_of
from jiio.models import Generator
from jiio.optimizer import LBFGS, Adam
from jiio.precondition import Matrix, Scalar, Step
from jiio.schedule import Switch
from jiio.solver import Anderson
from jiio.tasks.generation import (
    RATE,
    SOLVER,
    reconstruction,
    reconstruction_step,
    restoration,
    restoration_step,
)
from jiio.tasks.latent_model import density, solve_equilibrium, start
from jiio.tasks.measurement import damage, measure

BATCH = 64
MATRIX_IMAGES = 64
ADAM = (0.02, 0.05, 0.1, 0.2, 0.4)
RATES = (0.1, 0.2, 0.3, 0.4, 0.6)
TOLERANCES = (1e-1, 3e-2, 1e-2)


def generator_cases(name: str, model: Generator, train: Tensor, test: Tensor, *, prior: float) -> Iterator[Case]:
    """Reconstruction and inpainting of a batch of test images; tuned on a batch of training images."""
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:BATCH]
    parts = train[:BATCH], test[order], test[order][:1]
    x = model.guess(train[:MATRIX_IMAGES])
    with torch.no_grad():
        average = reconstruction(model, train[:MATRIX_IMAGES], prior=prior)
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


def latent_contenders(batch: Batch, matrix: Tensor) -> dict[str, Settings]:
    """`matrix`: the inverse of the model's average Gauss-Newton matrix, which the quasi-Newton methods get too."""
    largest = float(torch.linalg.eigvalsh(torch.linalg.inv(matrix))[-1])
    initial, step = Matrix(matrix, 1.0), batch.step
    published = Step(Scalar(0.01), z=0.8, mu=0.6, schedule=Switch(at=62, factor=0.3), lag=None, cut=None)
    found: dict[str, Settings] = {
        "joint": {"default": Joint(step(RATE), SOLVER)},
        "joint, Picard": {f"rate {r}": Joint(step(r)) for r in RATES},
        "joint, Anderson": {f"rate {r}": Joint(step(r), Anderson(6)) for r in RATES},
        "joint, plain steps": {f"rate {r}": Joint(Step(Scalar(r, 1 / largest))) for r in RATES},
        "joint, published settings": {"the paper's": Joint(published, Anderson(20))},
        "nested cold Adam": {f"{r}, tol {t}": Nested(Adam(r), False, t) for r in ADAM for t in (3e-2, 1e-2)},
        "nested warm Adam": {f"{r}, tol {t}": Nested(Adam(r), True, t) for r in ADAM for t in (3e-2, 1e-2)},
        "nested warm L-BFGS": {f"tol {t}": Nested(LBFGS(initial=initial), True, t) for t in TOLERANCES},
        "joint, then L-BFGS": {
            f"after {k}": Handover(Joint(step(RATE)), LBFGS(initial=initial), after=k) for k in (5, 10, 20)
        },
    }
    if find_spec("torchdeq"):
        found["TorchDEQ, Adam"] = {f"{r}": TorchDEQ(r) for r in ADAM}
    return found


def latent_references(batch: Batch, matrix: Tensor) -> tuple[Method, ...]:
    """The long runs behind a reference cost."""
    return Joint(batch.step(0.2), SOLVER), Nested(LBFGS(initial=Matrix(matrix, 1.0)), True, 1e-3)


def clean(model: Generator, images: Tensor, prior: float) -> Batch:
    """Latents of clean images, from the mean of all latents."""
    with torch.no_grad():
        problem = reconstruction(model, images, prior=prior)
    return Batch(
        problem, start(model, len(images)), lambda rate: reconstruction_step(model, len(images), prior=prior, rate=rate)
    )


def holed(model: Generator, images: Tensor, prior: float) -> Batch:
    """Latents of images with a hole under one Gaussian, from the mean of all latents: the first half of a restoration,
    where all methods have the same minimum ahead."""
    operator, sigma = damage("hole")
    measurement = measure(operator, images, sigma=sigma, seed=0)
    gaussian = density(model).gaussian()
    with torch.no_grad():
        problem = restoration(model, measurement, gaussian)
    return Batch(
        problem, start(model, len(images)), lambda rate: restoration_step(model, measurement, gaussian, rate=rate)
    )
