"""Problems with exact answers, shared by the tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jiio import Constraint, Free, Problem, State
from jiio.tree import Tree

D, N = 3, 6  # size of x and of z


@dataclass(frozen=True)
class LinearQuadratic:
    """z = A z + B x + c with cost 1/2 |C z - y|^2 + prior/2 |x|^2: everything in closed form by dense algebra."""

    A: Tensor
    B: Tensor
    c: Tensor
    C: Tensor
    y: Tensor
    prior: float = 0.3

    def problem(self, c: Tensor | None = None, constraint: Constraint = Free()) -> Problem:
        offset = self.c if c is None else c

        def f(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return z @ self.A.T + x @ self.B.T + offset

        def cost(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return 0.5 * (z @ self.C.T - y).square().sum(1) + 0.5 * self.prior * x.square().sum(1)

        return Problem(f, cost, constraint, context=(self.y,))

    def start(self) -> State:
        batch = len(self.y)
        return State(self.y.new_zeros(batch, N), self.y.new_zeros(batch, N), self.y.new_zeros(batch, D))

    def solution(self) -> State:
        """(z*, mu*, x*) by solving the optimality system of each sample densely."""
        eye = torch.eye(N, dtype=self.A.dtype)
        gain = torch.linalg.solve(eye - self.A, self.B)  # dz*/dx
        rest = torch.linalg.solve(eye - self.A, self.c)
        hessian = gain.T @ self.C.T @ self.C @ gain + self.prior * torch.eye(D, dtype=self.A.dtype)
        x = torch.linalg.solve(hessian, ((self.y - rest @ self.C.T) @ self.C @ gain).T).T
        z = x @ gain.T + rest
        mu = torch.linalg.solve((eye - self.A).T, ((z @ self.C.T - self.y) @ self.C).T).T
        return State(z, mu, x)


def linear_quadratic(batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> LinearQuadratic:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    A = draw(N, N)
    return LinearQuadratic(
        0.6 * A / torch.linalg.matrix_norm(A, 2), 0.5 * draw(N, D), draw(N), 0.5 * draw(4, N), draw(batch, 4)
    )


class SmoothCell(torch.nn.Module):
    """z -> tanh(W z + U x + b), |W| = 0.7, and a quadratic cost: small, smooth, nothing special about it."""

    def __init__(self, *, dtype: torch.dtype = torch.float64, seed: int = 0, activation: object = torch.tanh):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        W = torch.randn(N, N, generator=generator, dtype=dtype)
        self.W = torch.nn.Parameter(0.7 * W / torch.linalg.matrix_norm(W, 2))
        self.U = torch.nn.Parameter(torch.randn(N, D, generator=generator, dtype=dtype))
        self.b = torch.nn.Parameter(0.3 * torch.randn(N, generator=generator, dtype=dtype))
        self.activation = activation

    def f(self, z: Tensor, x: Tensor, *context: Tree) -> Tensor:
        return self.activation(z @ self.W.T + x @ self.U.T + self.b)  # pyright: ignore[reportCallIssue]

    def cost(self, z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (z - y).square().sum(1) + 0.1 * x.square().sum(1)


def smooth_problem(cell: SmoothCell, batch: int = 3, constraint: Constraint = Free(), seed: int = 1) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    target = 0.8 * torch.tanh(torch.randn(batch, N, generator=generator, dtype=cell.W.dtype))
    return Problem(cell.f, cell.cost, constraint, context=(target,))


def zeros(problem: Problem) -> State:
    """The all-zero start of a problem made here."""
    target = problem.context[0]
    return problem.start(target.new_zeros(len(target), D), target.new_zeros(len(target), N))
