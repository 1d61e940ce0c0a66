from __future__ import annotations

from typing import Any

import pytest
import torch

from jiio.app.diagnose import advice, diagnose, latents
from jiio.load import load
from jiio.models import Generator, generator
from tests.app.runs import CONFIG, digits

HEALTHY: dict[str, Any] = {
    "samples": 8,
    "status": {"CONVERGED": 8, "STALLED": 0, "DIVERGED": 0, "NON_FINITE": 0, "BUDGET": 0},
    "spectral_radius": {"median": 0.5, "largest": 0.6},
    "preconditioned": {"least": 0.5, "largest": 2.0, "worst": 3.0},
    "gradient": {"cosine": 0.99, "relative_error": 0.1},
}


def test_a_diagnosis_is_repeated_by_its_seed() -> None:
    model = load("digits-generator")
    assert isinstance(model, Generator)
    first, again = (diagnose(model, digits(4), prior=0.05, seed=1) for _ in range(2))
    assert first == again


def test_latents_are_measured_by_the_density_that_samples_come_from() -> None:
    model = generator(CONFIG)
    variances = torch.tensor([9.0, 9.0, 1e-4, 1e-4])
    model.density_precision[0] = torch.diag(1 / variances)
    usual = variances.sqrt() * torch.randn(2000, 4, generator=torch.Generator().manual_seed(1))
    found = latents(model, usual, seed=0)
    assert found["size"] == 4 and found["directions"] == pytest.approx(2, rel=1e-3)
    assert found["energy"]["images"] == pytest.approx(2, rel=0.1)  # half a nat for each direction
    assert found["energy"]["drawn"] == pytest.approx(2, rel=0.1)
    assert latents(model, usual + torch.tensor([9.0, 0, 0, 0]), seed=0)["energy"]["images"] > 6


def test_a_healthy_model_needs_no_change() -> None:
    assert advice(HEALTHY) == ["nothing to change: the inner solve converges and the gradients agree."]


@pytest.mark.parametrize(
    "symptom, sentence",
    [
        ({"spectral_radius": {"median": 0.9, "largest": 1.2}}, "no contraction"),
        ({"spectral_radius": {"median": 0.95, "largest": 0.99}}, "answer slowly"),
        ({"preconditioned": {"least": 0.1, "largest": 9.0, "worst": 50.0}}, "input steps overshoot"),
        ({"status": HEALTHY["status"] | {"CONVERGED": 6, "BUDGET": 2}}, "raise max_steps"),
        ({"status": HEALTHY["status"] | {"CONVERGED": 6, "STALLED": 2}}, "lower the input rate"),
        ({"gradient": {"cosine": 0.5, "relative_error": 0.8}}, "use gradient='exact'"),
    ],
)
def test_each_symptom_has_its_advice(symptom: dict[str, Any], sentence: str) -> None:
    (line,) = advice(HEALTHY | symptom)
    assert sentence in line
