"""The negative evidence lower bound, its gradient, and the search for latents that a VAE gets."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_divergence

from jiio.models import VAE, VAEConfig, vae
from jiio.tasks.metrics import psnr
from jiio.tasks.vae import VAELoss, decode, draw, encode, fit_vae, kl_divergence, search
from tests.tasks.test_generation import images

CONFIG = VAEConfig(image_shape=(1, 8, 8), latent=4, channels=(4, 8), encoder_channels=(4, 8), patch=1)


def tiny(dtype: torch.dtype = torch.float32) -> VAE:
    torch.manual_seed(0)
    model = vae(CONFIG).to(dtype)
    model.generator.calibrate(images(32, dtype))
    return model


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_loss_is_the_negative_evidence_lower_bound_at_the_best_pixel_variance() -> None:
    model, batch = tiny(torch.float64), images(5, torch.float64)
    model.encoder.network.tol = 1e-11
    with torch.no_grad():
        loss, parts = VAELoss(model, tol=1e-11)(batch, generator=seeded(3))
        mean, log_variance = model.encoder(batch)
        x = draw(mean, log_variance, seeded(3))
        decoded = model.generator.readout(parts.solution.value)

        def bound(variance: float) -> float:
            likelihood = Normal(decoded, math.sqrt(variance)).log_prob(batch).flatten(1).sum(1)
            divergence = exact_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(1)
            return float((divergence - likelihood).mean())

    assert torch.equal(x, parts.x)
    variance = float(parts.variance)
    assert float(loss) == pytest.approx(bound(variance), rel=1e-9)
    assert bound(0.9 * variance) > float(loss) and bound(1.1 * variance) > float(loss)


def test_the_divergence_is_zero_for_a_unit_gaussian_alone() -> None:
    assert kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0.0, 0.0]
    mean, log_variance = torch.randn(50, 3, generator=seeded()), torch.randn(50, 3, generator=seeded(1))
    assert bool((kl_divergence(mean, log_variance) > 0).all())


def test_draws_have_the_mean_and_variance_asked_for() -> None:
    mean, log_variance = torch.full((20000, 1), 2.0), torch.full((20000, 1), math.log(9.0))
    x = draw(mean, log_variance, seeded())
    assert float(x.mean()) == pytest.approx(2, abs=0.1)
    assert float(x.std()) == pytest.approx(3, abs=0.1)
    assert torch.equal(x, draw(mean, log_variance, seeded()))


def test_the_gradient_matches_finite_differences_in_encoder_and_decoder() -> None:
    model, batch = tiny(torch.float64), images(3, torch.float64)
    model.encoder.network.tol = 1e-11
    module = VAELoss(model, tol=1e-11)
    module(batch, generator=seeded())[0].backward()
    parameters = list(model.parameters())
    assert all(p.grad is not None and float(p.grad.norm()) > 0 for p in parameters)
    for part in (model.encoder, model.generator):
        weights = list(part.parameters())
        directions = [
            torch.randn(p.shape, dtype=p.dtype, generator=seeded(1)) * p.detach().abs().mean() for p in weights
        ]
        slope = sum(float((p.grad * d).sum()) for p, d in zip(weights, directions, strict=True))  # pyright: ignore
        values, eps = [], 1e-4
        with torch.no_grad():
            for sign in (1, -2, 1):
                for p, d in zip(weights, directions, strict=True):
                    p.add_(sign * eps * d)
                values.append(float(module(batch, generator=seeded())[0]))
        assert slope == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-4)


def test_training_lowers_the_loss_and_the_search_improves_on_the_encoder() -> None:
    model, batch = tiny(), images(32)
    module = VAELoss(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for k in range(20):
        optimizer.zero_grad()
        loss, parts = module(batch, generator=seeded(k))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        assert bool(parts.solution.converged.all())
    assert losses[-1] < losses[0] - 10
    fit_vae(model, batch, generator=seeded())
    latent = encode(model, batch)[0]
    found, solution = search(model, batch, latent=latent, on_failure="ignore")
    assert float(solution.converged.float().mean()) > 0.9
    assert psnr(found, batch) > psnr(decode(model, latent), batch)


def test_the_fit_takes_the_pixel_variance_of_drawn_latents() -> None:
    model, batch = tiny(), images(16)
    fit_vae(model, batch, generator=seeded(5))
    mean, log_variance = encode(model, batch)
    decoded = decode(model, draw(mean, log_variance, seeded(5)))
    assert float(model.pixel_variance) == pytest.approx(float((decoded - batch).square().mean()), rel=1e-4)
    assert 0 < float(model.generator.residual_variance.mean()) <= float(model.pixel_variance)
    assert float(model.generator.tangent.norm()) > 0
