from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jiio.app.main import main
from jiio.app.sample import COLUMNS, added, decode, density_of, interpolation
from jiio.load import load
from jiio.models import Generator
from tests.app.runs import tiny_run

PICTURES = ("samples.png", "reconstructions.png", "interpolation.png", "arithmetic.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run folder."""
    return tiny_run(tmp_path_factory.mktemp("runs") / "tiny").path


@pytest.fixture(scope="module")
def model(run: Path) -> Generator:
    found = load(run)
    assert isinstance(found, Generator)
    return found


def test_sample_writes_four_pictures(run: Path, tmp_path: Path) -> None:
    arguments = ["sample", str(run), "--rows", "1", "--density", "gaussian", "-o", str(tmp_path), "--threads", "1"]
    assert main(arguments) == 0
    assert all((tmp_path / name).exists() for name in PICTURES)


def test_a_density_that_belongs_to_a_vae_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(run), "--density", "prior", "--threads", "1"]) == 2
    assert "--density prior is for a VAE" in capsys.readouterr().err


def test_latents_that_cancel_leave_the_third_image(model: Generator) -> None:
    a, c = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(added(model, torch.cat((a, a, c))), decode(model, c), atol=1e-3)


def test_an_interpolation_goes_straight_from_one_image_to_another(
    model: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, drawn = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), []
    monkeypatch.setattr("jiio.app.sample.image_grid", lambda rows, path: (drawn.extend(rows), path)[1])
    interpolation(model, x, tmp_path / "interpolation.png")
    shown = torch.stack([images for _, images, _ in drawn])
    assert shown.shape == (3, COLUMNS, 1, 8, 8)
    for column in (0, 3, COLUMNS - 1):
        latents = x[:3] + column / (COLUMNS - 1) * (x[3:] - x[:3])
        assert torch.allclose(shown[:, column], decode(model, latents), atol=1e-3)


def test_the_densities_to_draw_from_are_a_mixture_one_gaussian_and_a_unit_gaussian(model: Generator) -> None:
    mixture, gaussian, prior = (density_of(model, kind) for kind in ("mixture", "gaussian", "prior"))
    assert len(mixture.weight) == model.config.components
    assert len(gaussian.weight) == len(prior.weight) == 1
    assert torch.allclose(gaussian.center(), mixture.center())
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    assert prior.energy(x).tolist() == pytest.approx([12.5])
