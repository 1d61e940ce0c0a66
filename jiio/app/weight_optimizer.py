"""The optimiser of a training's weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.99)
MOMENTUM = 0.8
MATRIX_RATE = 4.0  # length of a step of a matrix, in parts of what Adam's would be
FLATTENED = 1e-2


class WeightOptimizer:
    """Muon (Jordan et al. 2024) for weights that act as matrices, Adam for biases and numbers.

    A step of a matrix, of a kernel as (outputs, all else), is the orthogonal factor of its gradient's moving average: equally
    far along all singular directions, where Adam moves weights whose operator norm is kept hardly along the smaller ones.
    After 120 steps of MNIST a generator is 2 dB better than with Adam (docs/experiments.md). The factor comes from an
    eigendecomposition in which singular values below `FLATTENED` of the largest fade: torch.optim.Muon takes no kernels,
    and its iteration in bfloat16 makes so much of a last bit that several processes part from one.

    decay: of a matrix, times the learning rate, what fades of it at a step (Loshchilov and Hutter 2019).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, decay: float = 0.0):
        self.parameters, self.decay = list(parameters), decay
        self.matrices = [weight for weight in self.parameters if _is_matrix(weight)]
        self.averages = [torch.zeros_like(weight) for weight in self.matrices]
        rest = [weight for weight in self.parameters if not _is_matrix(weight)]
        self.adam = torch.optim.Adam([{"params": rest}], betas=BETAS)  # a group may be empty, a list may not

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for weight in self.parameters:
            weight.grad = None

    def step(self, learning_rate: float) -> None:
        """One step, each number of a weight moved by about `learning_rate`, of a matrix by `MATRIX_RATE` times as much."""
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.adam.step()
        with torch.no_grad():
            for weight, average in zip(self.matrices, self.averages, strict=True):
                if weight.grad is None:
                    continue
                average.lerp_(weight.grad, 1 - MOMENTUM)
                moved = orthogonal_factor(torch.lerp(weight.grad, average, MOMENTUM).flatten(1))
                weight.mul_(1 - self.decay * learning_rate)
                weight.sub_(moved.view_as(weight), alpha=MATRIX_RATE * learning_rate * max(moved.shape) ** 0.5)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"adam": self.adam.state_dict(), "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.adam.load_state_dict(state["adam"])
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)


def orthogonal_factor(matrix: Tensor) -> Tensor:
    """U diag(s / sqrt(s^2 + (FLATTENED max(s))^2)) V^T of matrix = U diag(s) V^T, (rows, columns); 0 for 0,
    NaN where something is not finite.

    >>> orthogonal_factor(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 2.0]])).round(decimals=2)
    tensor([[1., 0., 0.],
            [0., 0., 1.]])
    """
    if matrix.shape[0] < matrix.shape[1]:
        return orthogonal_factor(matrix.mT).mT
    square = (matrix.mT @ matrix).double()
    # eigh would raise, where a training has a sentence for a loss that is not finite
    if not bool(square.isfinite().all()):
        return torch.full_like(matrix, torch.nan)
    values, vectors = torch.linalg.eigh(square)
    softened = values.clamp_min(0) + FLATTENED**2 * values[-1].clamp_min(torch.finfo(matrix.dtype).tiny)
    root = (vectors / softened.sqrt()) @ vectors.mT
    return matrix @ root.to(matrix.dtype)


def _is_matrix(weight: Tensor) -> bool:
    return weight.dim() in (2, 4) and min(len(weight), weight[0].numel()) > 1
