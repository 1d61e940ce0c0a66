"""The variational autoencoder (Kingma and Welling 2014) as a baseline of generation by latent optimisation.

Encoder q(x | y) = N(mean(y), exp(log_variance(y))), prior p(x) = N(0, 1), decoder p(y | x) = N(h(z*(x)), v) per pixel:

    loss = mean over images of   |y - h(z*(x))|^2 / (2 v) + pixels/2 log(2 pi v) + KL(q(x | y) | p(x)),     x ~ q(x | y)

v is where the loss is least, the batch's mean squared error of a pixel (Rybkin, Daniilidis and Levine, ICML 2021): a fixed
v is a weight of the KL term chosen by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from jiio.deq import DEQ
from jiio.implicit import implicit
from jiio.solution import Solution
from jiio.tasks.generation import reconstruct
from jiio.tasks.image_rule import refit_tangent
from jiio.tasks.latent_fit import FIT_BATCH, fit_latents
from jiio.tasks.latent_model import LatentModel, solve_equilibrium

LEAST_VARIANCE = 1e-6  # of a pixel in [0, 1]: below what 8 bits resolve the likelihood means nothing


class Autoencoder(Protocol):
    """What this task needs of a model; `jiio.models.VAE` is one."""

    pixel_variance: Tensor

    @property
    def encoder(self) -> Any:
        """images -> (mean, log variance), each (batch, latent)."""
        ...

    @property
    def generator(self) -> LatentModel:
        """The decoder."""
        ...


class Elbo(NamedTuple):
    """Parts of the loss: pixel variance; KL divergence in nats an image, with graph; latents drawn; the decoder's solve."""

    variance: Tensor
    divergence: Tensor
    x: Tensor
    solution: Solution[Any]


class VAELoss(nn.Module):
    """forward(images, generator=...) -> (loss, parts): the negative evidence lower bound in nats an image.

    The decoder's equilibrium is solved to `tol`, its gradient by implicit differentiation to `tol`; the encoder solves its
    own by the model's settings.
    """

    def __init__(self, model: Autoencoder, *, tol: float = 1e-3):
        super().__init__()
        self.model: Autoencoder = model
        self.tol = tol

    def forward(self, images: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Elbo]:
        """images (batch, channels, height, width) in [0, 1]; one latent an image, noise from `generator` of the CPU."""
        decoder = self.model.generator
        mean, log_variance = self.model.encoder(images)
        x = draw(mean, log_variance, generator)
        f, readout = decoder.cell(), decoder.decoder()
        solution = DEQ(f, tol=self.tol, on_failure="ignore").solve(x, decoder.start(x))
        z = implicit(solution, tol=self.tol, on_failure="ignore")
        variance = (readout(z) - images).square().mean().clamp_min(LEAST_VARIANCE)
        divergence = kl_divergence(mean, log_variance).mean()
        # at the best v the squared error over 2 v is half the number of pixels
        likelihood = 0.5 * images[0].numel() * ((2 * math.pi * variance).log() + 1)
        return likelihood + divergence, Elbo(variance.detach(), divergence, x.detach(), solution)


def draw(mean: Tensor, log_variance: Tensor, generator: torch.Generator) -> Tensor:
    """One latent from each Gaussian, differentiable in both parameters."""
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    return mean + (0.5 * log_variance).exp() * noise


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) | N(0, 1)) in nats, (batch,).

    >>> kl_divergence(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2))
    tensor([0.5000])
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)


def encode(model: Autoencoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, log variance) of images, a few at a time, without graph."""
    with torch.no_grad():
        parts = [model.encoder(batch) for batch in images.split(FIT_BATCH)]
    return torch.cat([mean for mean, _ in parts]), torch.cat([log_variance for _, log_variance in parts])


def decode(model: Autoencoder, latent: Tensor) -> Tensor:
    """The images of latents, a few at a time, without graph."""
    decoder = model.generator
    with torch.no_grad():
        return torch.cat([decoder.readout(solve_equilibrium(decoder, x)) for x in latent.split(FIT_BATCH)])


def search(model: Autoencoder, images: Tensor, **options: Any) -> tuple[Tensor, Solution[Any]]:
    """`reconstruct` under the VAE's own posterior: the most likely latent of each image. `options` are its."""
    return reconstruct(model.generator, images, prior=float(model.pixel_variance), **options)


def fit_vae(
    model: Autoencoder,
    images: Tensor,
    *,
    generator: torch.Generator,
    watch: Callable[[int], object] = lambda images: None,
) -> None:
    """Set the pixel variance, and the decoder's buffers as `fit_latents` does, by searches from the encoder's means.

    watch: is told how many more images are done.
    """
    mean, log_variance = encode(model, images)
    decoded = decode(model, draw(mean, log_variance, generator))
    variance = (decoded - images).square().mean().clamp_min(LEAST_VARIANCE)
    with torch.no_grad():
        model.pixel_variance.copy_(variance)
    refit_tangent(model.generator, mean)
    fit_latents(model.generator, images, prior=float(variance), latent=mean, watch=watch)
