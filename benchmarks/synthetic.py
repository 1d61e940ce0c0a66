"""Smooth, well-posed problems whose contraction and conditioning are set exactly.

    f(z, x) = act(W z + U x + b),   W = contraction * S,  S symmetric, eigenvalues from -1 to 1,  act(t) = 0.8 t + 0.2 tanh(t)
    cost(z, x) = 1/2 |D z - y|^2,   D (1 - W)^-1 U = R diag(s),   R with orthonormal columns

act has slopes between 0.8 and 1, so that |f(z, x) - f(z', x)| <= contraction |z - z'| with equality at 0, and at unit slopes
the curvature of x -> cost(z*(x), x) is diag(s^2): of condition max(s^2) / min(s^2), whatever the contraction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jiio import DEQ, Problem, State

BLOCK = 64


@dataclass(frozen=True)
class Family:
    """latent: size of x.  state: size of z, a multiple of 64.  The noise of y makes the least cost about a twentieth of
    the one at x = 0; every direction of x has an equal share in that, so that none can be neglected."""

    latent: int = 32
    state: int = 512
    batch: int = 32
    contraction: float = 0.9
    condition: float = 30.0
    seed: int = 0


class Cell:
    """f with one set of weights. S is made of blocks of 64, so that f costs `state` times 64."""

    def __init__(self, family: Family):
        draw = torch.Generator().manual_seed(family.seed)
        n, d = family.state, family.latent
        Q = torch.linalg.qr(torch.randn(n // BLOCK, BLOCK, BLOCK, generator=draw)).Q
        self.W = family.contraction * (Q * torch.linspace(-1, 1, BLOCK)) @ Q.mT
        self.U = torch.linalg.qr(torch.randn(n, d, generator=draw)).Q.T.contiguous()
        self.b = 0.3 * torch.randn(n, generator=draw)
        s = torch.logspace(0, -0.5, d, base=family.condition)
        R = torch.linalg.qr(torch.randn(2 * d, d, generator=draw)).Q
        # D = R diag(s) U^T (1 - W), so that D (1 - W)^-1 U = R diag(s)
        self.D = (self.U - self.linear(self.U)).T @ (s[:, None] * R.T)
        self.s = s

    def linear(self, z: Tensor) -> Tensor:
        """W z of rows z."""
        return torch.einsum("bki,kij->bkj", z.view(len(z), -1, BLOCK), self.W).reshape(len(z), -1)

    def f(self, z: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
        """One evaluation, (batch, state)."""
        t = self.linear(z) + x @ self.U + self.b
        return 0.8 * t + 0.2 * t.tanh()

    def cost(self, z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Half the squared distance of the decoded equilibrium from y, (batch,)."""
        return 0.5 * (z @ self.D - y).square().sum(1)


def make(family: Family, *, tuning: bool = False) -> tuple[Problem, State]:
    """A problem of the family and its start at 0; with `tuning` other targets for the same weights."""
    cell, draw = Cell(family), torch.Generator().manual_seed(1000 + 2 * family.seed + tuning)
    x = torch.randn(family.batch, family.latent, generator=draw) * 3 * (cell.s.min() / cell.s)
    zero = torch.zeros(family.batch, family.state)
    with torch.no_grad():
        clean = DEQ(cell.f, tol=1e-6, max_steps=2000, on_failure="ignore")(x, zero) @ cell.D
        origin = DEQ(cell.f, tol=1e-6, max_steps=2000, on_failure="ignore")(0 * x, zero) @ cell.D
    size = (clean - origin).square().sum(1, keepdim=True).mean().sqrt()
    noise = torch.randn(clean.shape, generator=draw) / clean.shape[1] ** 0.5
    problem = Problem(cell.f, cell.cost, context=(clean + 0.3 * size * noise,))
    return problem, problem.start(torch.zeros_like(x), zero)
