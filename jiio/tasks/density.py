"""A density of latents: a mixture of Gaussians fitted to the latents of the training images."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

PER_COMPONENT = 8  # latents, times their size, that a component is fitted to at least
RIDGE = 1e-3  # of the mean variance, on each component's covariance
LEAST_VARIANCE = 1e-6  # of each entry of a component: latents that are all one have none, and no density
UNUSED = -1e30  # log weight of a component that is not used: finite, so that its gradient is 0 and not NaN


class LatentDensity(NamedTuple):
    """p(x) = sum_k weight_k N(x; mean_k, precision_k^-1), over latents x (batch, latent).

    weight: (components,), sums to 1.  mean: (components, latent).  precision: (components, latent, latent).
    log_peak: (components,), log(weight_k sqrt(det precision_k)), up to a number that they share.

    >>> unit = LatentDensity(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None], torch.zeros(1))
    >>> unit.energy(torch.tensor([[3.0, 4.0]]))
    tensor([12.5000])
    """

    weight: Tensor
    mean: Tensor
    precision: Tensor
    log_peak: Tensor

    def energy(self, x: Tensor) -> Tensor:
        """-log p(x), (batch,), plus a constant that makes it at least 0."""
        return self.log_peak.logsumexp(0) - self._log_joint(x).logsumexp(1)

    def curvature(self, x: Tensor) -> Tensor:
        """sum_k p(k | x) precision_k, (batch, latent, latent): at least the energy's Hessian, and positive."""
        share = self._log_joint(x).softmax(1)
        return torch.einsum("bk,kij->bij", share, self.precision)

    def center(self) -> Tensor:
        """The mean of all latents, (latent,)."""
        return self.weight @ self.mean

    def gaussian(self) -> LatentDensity:
        """The one Gaussian of the same mean and covariance."""
        mean = self.center()
        offset = self.mean - mean
        within = torch.einsum("k,kij->ij", self.weight, torch.linalg.inv(self.precision))
        precision = torch.linalg.inv(within + (offset.T * self.weight) @ offset)
        return LatentDensity(self.weight.new_ones(1), mean[None], precision[None], self.weight.new_zeros(1))

    @classmethod
    def standard(cls, like: Tensor) -> LatentDensity:
        """N(0, 1) of latents like `like` (latent,)."""
        one = like.new_ones(1)
        return cls(one, torch.zeros_like(like)[None], torch.eye(len(like)).to(like)[None], torch.zeros_like(one))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` latents drawn from p, (count, latent); `generator` of the CPU."""
        chosen = torch.multinomial(self.weight.cpu(), count, replacement=True, generator=generator)
        noise = torch.randn(count, self.mean.shape[1], generator=generator).to(self.mean)
        # precision = R R^T, so R^-T noise has covariance R^-T R^-1, its inverse
        root = torch.linalg.cholesky(self.precision)[chosen]
        return self.mean[chosen] + torch.linalg.solve_triangular(root.mT, noise[:, :, None], upper=True)[:, :, 0]

    def _log_joint(self, x: Tensor) -> Tensor:
        offset = x[None] - self.mean[:, None]
        square = ((offset @ self.precision) * offset).sum(2).T
        return self.log_peak - 0.5 * square

    @classmethod
    def fit(cls, latents: Tensor, *, components: int, seed: int = 0) -> LatentDensity:
        """Fitted to `latents` (count, latent) by expectation maximisation; components that so few latents can't support
        keep a weight of 0. Latents that do not differ, as a single one, make a narrow Gaussian about them."""
        from sklearn.exceptions import ConvergenceWarning  # a second of start-up, which most commands need not pay
        from sklearn.mixture import GaussianMixture

        count, size = latents.shape
        used = max(1, min(components, count // (PER_COMPONENT * size)))
        values = latents.detach().double().cpu().numpy()
        mixture = GaussianMixture(used, reg_covar=max(RIDGE * values.var(), LEAST_VARIANCE), random_state=seed)
        with warnings.catch_warnings():
            # a fit stopped after 100 rounds is as good a prior as one that went on
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture.fit(values if count > 1 else values.repeat(2, axis=0))  # scikit-learn asks for two
        weight, mean = latents.new_zeros(components), latents.new_zeros(components, size)
        precision = torch.eye(size).to(latents).repeat(components, 1, 1)
        for target, found in (
            (weight, mixture.weights_),
            (mean, mixture.means_),
            (precision, mixture.precisions_),
        ):
            target[:used] = torch.as_tensor(found).to(latents)
        log_peak = weight.log().clamp_min(UNUSED) + 0.5 * torch.linalg.slogdet(precision).logabsdet
        return cls(weight, mean, precision, log_peak)
