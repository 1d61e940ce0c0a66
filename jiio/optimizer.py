"""Outer optimisers of the nested baseline, each sample on its own (torch.optim.LBFGS couples a batch by its line search).

`init(x)` makes a memory, `step(memory, x, gradient, cost)` returns the next x, before projection, and the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from jiio.precondition import Rule, Scalar
from jiio.schedule import Constant, Schedule
from jiio.tree import wide


class Optimizer(Protocol):
    """What `nested` needs of an optimiser."""

    def init(self, x: Tensor) -> Any:
        """Memory for inputs of the form of `x`."""
        ...

    def step(self, memory: Any, x: Tensor, gradient: Tensor, cost: Tensor) -> tuple[Tensor, Any]:
        """The next input and memory; `cost` is (batch,)."""
        ...


class _AdamMemory(NamedTuple):
    steps: int
    mean: Tensor
    square: Tensor


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba 2015); elementwise, so samples are independent."""

    rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    schedule: Schedule = Constant()

    def init(self, x: Tensor) -> _AdamMemory:
        """Zero moments."""
        return _AdamMemory(0, torch.zeros_like(x), torch.zeros_like(x))

    def step(self, memory: _AdamMemory, x: Tensor, gradient: Tensor, cost: Tensor) -> tuple[Tensor, _AdamMemory]:
        """One update with bias-corrected moments."""
        b1, b2 = self.betas
        count = memory.steps + 1
        mean = torch.lerp(gradient, memory.mean, b1)
        square = torch.lerp(gradient.square(), memory.square, b2)
        scaled = (mean / (1 - b1**count)) / ((square / (1 - b2**count)).sqrt() + self.epsilon)
        return x - self.rate * self.schedule(memory.steps) * scaled, _AdamMemory(count, mean, square)


@dataclass(frozen=True)
class PGD:
    """x - rate P g with the rule's P: `Normalized` or `Sign` for attacks (Madry et al. 2018), `Scalar`, `Matrix`."""

    rule: Rule = Scalar(0.1)
    schedule: Schedule = Constant()

    def init(self, x: Tensor) -> int:
        """The number of steps made."""
        return 0

    def step(self, memory: int, x: Tensor, gradient: Tensor, cost: Tensor) -> tuple[Tensor, int]:
        """One preconditioned gradient step."""
        rate = torch.as_tensor(self.rule.rate, dtype=x.dtype, device=x.device).expand(len(x)) * self.schedule(memory)
        return x - wide(rate, x) * self.rule.direction(gradient), memory + 1


class _LBFGSMemory(NamedTuple):
    s: Tensor  # (batch, history, n), steps, newest last
    y: Tensor  # (batch, history, n), changes of the gradient
    x: Tensor  # (batch, n), the last accepted input, with its gradient and cost
    gradient: Tensor
    cost: Tensor
    direction: Tensor  # tried from x, at `length`
    length: Tensor


@dataclass(frozen=True)
class LBFGS:
    """L-BFGS (Liu and Nocedal 1989) of each sample, with an Armijo test and step halving of each sample.

    initial: the rule whose P is the initial inverse Hessian (a model's preconditioner, say); the usual scaling
    <s, y> / <y, y> by default. first: length of the very first step without `initial`.
    """

    history: int = 10
    initial: Rule | None = None
    first: float = 0.5

    def __post_init__(self) -> None:
        if self.history < 1:
            raise ValueError(f"history must be at least 1, got {self.history}")

    def init(self, x: Tensor) -> _LBFGSMemory:
        """No pairs; every first iterate is accepted because the cost before it is infinite."""
        flat = x.flatten(1)
        pairs = [flat.new_zeros(len(x), self.history, flat.shape[1]) for _ in range(2)]
        zeros = torch.zeros_like(flat)
        cost = flat.new_full((len(x),), torch.inf)
        return _LBFGSMemory(pairs[0], pairs[1], flat, zeros, cost, zeros, flat.new_zeros(len(x)))

    def step(self, memory: _LBFGSMemory, x: Tensor, gradient: Tensor, cost: Tensor) -> tuple[Tensor, _LBFGSMemory]:
        """Accept x and move on, or go back half the way, sample by sample."""
        flat, g = x.flatten(1), gradient.flatten(1)
        slope = torch.linalg.vecdot(memory.gradient, memory.direction)
        accepted = cost <= memory.cost + 1e-4 * memory.length * slope
        fresh = self._remember(memory, flat, g)
        direction = self._direction(fresh, g)
        length = torch.where(accepted, self._first_length(fresh, direction), memory.length / 2)
        keep = accepted[:, None]
        memory = _LBFGSMemory(
            torch.where(keep[..., None], fresh.s, memory.s),
            torch.where(keep[..., None], fresh.y, memory.y),
            torch.where(keep, flat, memory.x),
            torch.where(keep, g, memory.gradient),
            torch.where(accepted, cost, memory.cost),
            torch.where(keep, direction, memory.direction),
            length,
        )
        return (memory.x + length[:, None] * memory.direction).view_as(x), memory

    def _remember(self, memory: _LBFGSMemory, x: Tensor, g: Tensor) -> _LBFGSMemory:
        s, y = x - memory.x, g - memory.gradient
        curved = torch.linalg.vecdot(s, y) > 1e-8 * torch.linalg.vecdot(y, y)
        curved &= memory.cost.isfinite()
        pair = curved[:, None, None]
        return memory._replace(
            s=torch.where(pair, torch.cat((memory.s[:, 1:], s[:, None]), dim=1), memory.s),
            y=torch.where(pair, torch.cat((memory.y[:, 1:], y[:, None]), dim=1), memory.y),
        )

    def _direction(self, memory: _LBFGSMemory, g: Tensor) -> Tensor:
        """The two-loop recursion; slots without a pair have s = y = 0 and drop out."""
        product = torch.linalg.vecdot(memory.s, memory.y)
        rho = torch.where(product > 0, 1 / product.clamp_min(torch.finfo(g.dtype).tiny), 0.0)
        q, alphas = g, []
        for i in reversed(range(self.history)):
            alpha = rho[:, i] * torch.linalg.vecdot(memory.s[:, i], q)
            q = q - alpha[:, None] * memory.y[:, i]
            alphas.append(alpha)
        r = self._initial(memory, q, product)
        for i, alpha in zip(range(self.history), reversed(alphas), strict=True):
            beta = rho[:, i] * torch.linalg.vecdot(memory.y[:, i], r)
            r = r + (alpha - beta)[:, None] * memory.s[:, i]
        return -r

    def _initial(self, memory: _LBFGSMemory, q: Tensor, product: Tensor) -> Tensor:
        if self.initial is not None:
            return self.initial.direction(q)
        newest = product[:, -1]
        squares = torch.linalg.vecdot(memory.y[:, -1], memory.y[:, -1])
        gamma = torch.where(newest > 0, newest / squares.clamp_min(torch.finfo(q.dtype).tiny), 1.0)
        return gamma[:, None] * q

    def _first_length(self, memory: _LBFGSMemory, direction: Tensor) -> Tensor:
        known = torch.linalg.vecdot(memory.s[:, -1], memory.y[:, -1]) > 0
        size = torch.linalg.vector_norm(direction, dim=1).clamp_min(torch.finfo(direction.dtype).tiny)
        if self.initial is not None:
            return torch.ones_like(size)
        return torch.where(known, 1.0, (self.first / size).clamp_max(1.0))
