"""A variational autoencoder whose encoder and decoder are both equilibrium networks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jiio.models.classifier import ClassifierConfig
from jiio.models.encoder import Encoder, encoder
from jiio.models.generator import Generator, GeneratorConfig, generator


@dataclass(frozen=True)
class VAEConfig(GeneratorConfig):
    """All that rebuilds a `VAE` but its weights: a `GeneratorConfig` for the decoder, and what its encoder has of its own.

    encoder_channels: of the encoder's scales, finest first.  encoder_contraction: bound on its cell in z.
    """

    encoder_channels: tuple[int, ...] = (32, 64)
    encoder_contraction: float = 0.7

    @property
    def encoder(self) -> ClassifierConfig:
        """The encoder's configuration."""
        return ClassifierConfig(
            image_shape=self.image_shape,
            classes=2 * self.latent,
            channels=self.encoder_channels,
            patch=self.patch,
            cell=self.cell,
            contraction=self.encoder_contraction,
            activation=self.activation,
        )


class VAE(nn.Module):
    """image -> Gaussian of the latent x by `encoder`; x -> image by `generator`, the same `Generator` that is trained
    without an encoder elsewhere, so that every task of latents takes it.

    Buffer `pixel_variance`: of a pixel about the decoded image of a latent drawn from the encoder; training sets it. Times
    it the negative log posterior of a latent is half the squared error plus pixel_variance / 2 |x|^2.

    >>> model = vae(VAEConfig(image_shape=(1, 8, 8), latent=3, channels=(4, 8), encoder_channels=(4, 8), patch=1))
    >>> [tuple(part.shape) for part in model.encoder(torch.zeros(2, 1, 8, 8))]
    [(2, 3), (2, 3)]
    """

    pixel_variance: Tensor

    def __init__(self, config: VAEConfig, encoder: Encoder, generator: Generator):
        super().__init__()
        self.config, self.encoder, self.generator = config, encoder, generator
        self.register_buffer("pixel_variance", torch.ones(()))


def vae(config: VAEConfig) -> VAE:
    """A `VAE` with fresh weights from torch's global random state."""
    return VAE(config, encoder(config.encoder), generator(config))
