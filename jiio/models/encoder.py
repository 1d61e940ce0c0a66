"""An encoder: image -> equilibrium -> mean and log variance of a latent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from jiio.models.activation import Name
from jiio.models.classifier import Classifier, ClassifierConfig, classifier
from jiio.models.config import ScaledConfig
from jiio.models.injection import Shape


@dataclass(frozen=True)
class EncoderConfig(ScaledConfig):
    """All that rebuilds an `Encoder` but its weights. `to_dict` and `from_dict` go through JSON.

    latent: entries of the latent.  The rest as in `ClassifierConfig`.
    """

    image_shape: Shape = (1, 28, 28)
    latent: int = 32
    channels: tuple[int, ...] = (32, 64)
    patch: int = 2
    cell: Literal["well_posed", "mdeq"] = "well_posed"
    contraction: float = 0.7
    limit: float = 6.0
    activation: Name = "silu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent < 1:
            raise ValueError(f"an encoder needs a latent of at least 1 entry, got {self.latent}")

    @property
    def network(self) -> ClassifierConfig:
        """The equilibrium network with two outputs for each entry of the latent."""
        return ClassifierConfig(
            image_shape=self.image_shape,
            classes=2 * self.latent,
            channels=self.channels,
            patch=self.patch,
            cell=self.cell,
            contraction=self.contraction,
            limit=self.limit,
            activation=self.activation,
        )


class Encoder(nn.Module):
    """images (batch, channels, height, width) in [0, 1] -> (mean, log variance) of the latent, each (batch, latent).

    The network is a `Classifier`'s: image injection, equilibrium, a linear head on all scales. Its solve has the exact
    gradient, in `eval()` too; `network.tol` and `network.on_failure` are the solve's.
    """

    def __init__(self, config: EncoderConfig, network: Classifier):
        super().__init__()
        self.config, self.network = config, network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log variance) of a Gaussian with independent entries."""
        mean, log_variance = self.network(images).chunk(2, dim=1)
        return mean, log_variance


def encoder(config: EncoderConfig) -> Encoder:
    """An `Encoder` with fresh weights from torch's global random state.

    >>> import torch
    >>> model = encoder(EncoderConfig(image_shape=(1, 8, 8), latent=3, patch=1, channels=(8, 16)))
    >>> [tuple(part.shape) for part in model(torch.zeros(2, 1, 8, 8))]
    [(2, 3), (2, 3)]
    """
    return Encoder(config, classifier(config.network))
