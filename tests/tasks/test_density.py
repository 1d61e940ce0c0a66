from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from jiio.tasks.density import LatentDensity


def clusters(count: int = 400) -> torch.Tensor:
    """Two clusters around (-4, 0) and (4, 0), a third of the points in the first."""
    generator = torch.Generator().manual_seed(0)
    side = torch.where(torch.rand(count, generator=generator) < 1 / 3, -4.0, 4.0)
    return torch.randn(count, 2, generator=generator) * 0.5 + torch.stack((side, torch.zeros(count)), dim=1)


def exact(density: LatentDensity) -> MixtureSameFamily:
    used = density.weight > 0
    parts = MultivariateNormal(density.mean[used], precision_matrix=density.precision[used])
    return MixtureSameFamily(Categorical(density.weight[used]), parts)


def test_energy_is_minus_the_log_density_up_to_a_constant() -> None:
    density = LatentDensity.fit(clusters(), components=4)
    x = torch.randn(20, 2) * 3
    difference = density.energy(x) + exact(density).log_prob(x)
    assert float(difference.max() - difference.min()) < 1e-4
    assert bool((density.energy(density.mean[density.weight > 0]) >= 0).all())


def test_fit_finds_the_clusters() -> None:
    density = LatentDensity.fit(clusters(), components=2)
    order = density.mean[:, 0].argsort()
    assert torch.allclose(density.mean[order], torch.tensor([[-4.0, 0.0], [4.0, 0.0]]), atol=0.2)
    assert abs(float(density.weight[order][0]) - 1 / 3) < 0.08


def test_components_that_few_latents_cannot_support_are_unused_and_harmless() -> None:
    latents = clusters(20)
    density = LatentDensity.fit(latents, components=8)
    assert int((density.weight > 0).sum()) == 1
    x = torch.randn(5, 2, requires_grad=True)
    density.energy(x).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
    assert torch.allclose(density.energy(x.detach()), density.gaussian().energy(x.detach()), rtol=1e-3)


@pytest.mark.parametrize(
    "latents", [torch.ones(1, 3), torch.zeros(40, 3), torch.tensor([[1.0, 2.0, 3.0]]).expand(300, 3)]
)
def test_latents_that_do_not_differ_have_a_narrow_density(latents: torch.Tensor) -> None:
    """Of a folder with one image, or where a training found one latent for all."""
    density = LatentDensity.fit(latents, components=4)
    drawn = density.sample(50, torch.Generator().manual_seed(0))
    assert torch.allclose(drawn.mean(0), latents[0], atol=0.1)
    assert bool(density.energy(drawn).isfinite().all() and density.gaussian().precision.isfinite().all())


def test_one_gaussian_keeps_mean_and_covariance() -> None:
    density = LatentDensity.fit(clusters(), components=2)
    one = density.gaussian()
    samples = exact(density).sample(torch.Size([200_000]))
    assert torch.allclose(one.mean[0], samples.mean(0), atol=0.05)
    assert torch.allclose(torch.linalg.inv(one.precision[0]), torch.cov(samples.T), atol=0.15)


def test_curvature_bounds_the_hessian() -> None:
    density = LatentDensity.fit(clusters(), components=2)
    for x in torch.randn(10, 2) * 4:
        hessian = torch.autograd.functional.hessian(lambda v: density.energy(v[None]).sum(), x)
        assert float(torch.linalg.eigvalsh(density.curvature(x[None])[0] - hessian).min()) > -1e-3


def test_samples_have_the_moments_of_the_density() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = torch.tensor([[2.0, 0.6], [0.6, 0.5]])
    precision = torch.stack((torch.linalg.inv(shape), torch.eye(2)))
    weight, mean = torch.tensor([0.75, 0.25]), torch.tensor([[1.0, 0.0], [-3.0, 2.0]])
    density = LatentDensity(weight, mean, precision, torch.zeros(2))
    drawn = density.sample(40000, generator)
    first = drawn[(drawn - mean[1]).norm(dim=1) > 4]  # of the first component but for a few
    assert torch.allclose(drawn.mean(0), weight @ mean, atol=0.05)
    assert len(first) > 0.5 * len(drawn)
    alone = LatentDensity(torch.ones(1), mean[:1], precision[:1], torch.zeros(1)).sample(40000, generator)
    assert torch.allclose(alone.T.cov(), shape, atol=0.05)
