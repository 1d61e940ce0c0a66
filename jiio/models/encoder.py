"""An encoder: image -> equilibrium -> mean and log variance of a latent."""

from __future__ import annotations

from torch import Tensor, nn

from jiio.models.classifier import Classifier, ClassifierConfig, classifier


class Encoder(nn.Module):
    """images (batch, channels, height, width) in [0, 1] -> (mean, log variance) of the latent, each (batch, latent).

    The network is a `Classifier` with two outputs in place of classes for each entry of the latent: image injection,
    equilibrium, a linear head on all scales. Its solve has the exact gradient, in `eval()` too; `network.tol` and
    `network.on_failure` are the solve's.
    """

    def __init__(self, network: Classifier):
        super().__init__()
        if network.config.classes % 2:
            raise ValueError(f"an encoder needs two outputs for each entry of the latent, got {network.config.classes}")
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log variance) of a Gaussian with independent entries."""
        mean, log_variance = self.network(images).chunk(2, dim=1)
        return mean, log_variance


def encoder(config: ClassifierConfig) -> Encoder:
    """An `Encoder` with fresh weights from torch's global random state, `classes` being twice the latent's size.

    >>> import torch
    >>> model = encoder(ClassifierConfig(image_shape=(1, 8, 8), classes=6, patch=1, channels=(8, 16)))
    >>> [tuple(part.shape) for part in model(torch.zeros(2, 1, 8, 8))]
    [(2, 3), (2, 3)]
    """
    return Encoder(classifier(config))
