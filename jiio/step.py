"""A joint step: the input rule, and how z, mu and x go together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from jiio import tree
from jiio.constraint import Constraint
from jiio.precondition import Rule, Scalar, require_per_sample, require_rate
from jiio.schedule import Constant, Falling, Schedule
from jiio.tree import Tree

LEAST_MULTIPLIER = 1e-3


@dataclass(frozen=True)
class Step:
    """Rates of the joint iteration.

    x: an input rule, or a number for `Scalar(rate)`.  z, mu: damping of the equilibrium and adjoint rows, in (0, 1].
    schedule: multiplier of the input rate by step number.
    lag: each sample's input rate is multiplied by min(1, lag / (larger relative residual of its z and mu)), so that x
    waits while z and mu fall behind; `None` leaves the rate alone. A schedule gives the lag of every step: far from the
    minimum a large one is quick, near it a small one keeps slow oscillations down.
    cut: a sample whose gradient turned against its last steps (it overshot) has its rate multiplied by `cut`; the rate
    recovers by 2 % a step, never above the rule's own. `None` leaves it alone, as do solvers that mix iterates.
    lookahead: the direction is extrapolated by this many of its last changes, which makes up for the lag of z and mu where
    a constraint holds x (attacks: 1 saves a third of the steps); without one it turns into oscillation near the minimum,
    so there let a schedule take it away.
    tangent: dz*/dx, a tree of the form of z, each leaf (batch or 1, numbers in x, ...): where x moves by dx, z moves on by
    dz*/dx dx at once, in place of following in the course of 1 / (1 - contraction) steps, and the gradient in x is what it
    will be when mu has followed. A mean over some samples of a model will do, and `jiio.newton_step` measures one: with it and
    a good P an input rate of 1 holds, at contractions near 1, with many latents and bad conditions too (docs/scaling.md).
    """

    x: float | Rule
    z: float = 1.0
    mu: float = 1.0
    schedule: Schedule = Constant()
    lag: float | Schedule | None = Falling()
    cut: float | None = 0.7
    lookahead: float | Schedule = 0.0
    tangent: Tree | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("z", "mu"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"the damping of {name} must lie in (0, 1], got {getattr(self, name)}")
        if isinstance(self.lag, float | int) and not self.lag > 0:
            raise ValueError(f"lag must be positive or None, got {self.lag}")
        if self.cut is not None and not 0 < self.cut < 1:
            raise ValueError(f"cut must lie in (0, 1) or be None, got {self.cut}")
        if isinstance(self.lookahead, float | int) and self.lookahead < 0:
            raise ValueError(f"lookahead must not be negative, got {self.lookahead}")
        if isinstance(self.x, float | int):
            require_rate(self.x)
        elif isinstance(self.x, type) or not hasattr(self.x, "direction"):
            raise ValueError(f"x of a Step is a number or an input rule such as Scalar(rate), got {self.x!r}")

    @cached_property
    def rule(self) -> Rule:
        """The input rule."""
        return Scalar(float(self.x)) if isinstance(self.x, float | int) else self.x

    def check(self, constraint: Constraint, z: Tree, x: Tensor) -> None:
        """`ValueError` where the rule does not commute with `constraint`, or rule, rates or tangent do not fit z and x."""
        require_per_sample("the rate of an input step", self.rule.rate, x)
        self.rule.check(constraint, x)
        if self.tangent is not None:
            _check_tangent(self.tangent, z, x)

    def carry(self, z: Tree, move: Tensor) -> Tree:
        """z as it is at its equilibrium to first order when x has moved by `move`; without a tangent `z`."""
        if self.tangent is None:
            return z
        with torch.no_grad():  # else a tangent that requires grad would chain the steps of a solve into one graph
            return self._carried(z, move)

    def _carried(self, z: Tree, move: Tensor) -> Tree:
        moves = move.flatten(1)
        if tree.batch_size(self.tangent) > 1:
            return tree.apply(lambda leaf, part: leaf + tree.combine(part, moves), z, self.tangent)
        carried = []
        for leaf, (order, rows) in zip(tree.leaves(z), self._shared, strict=True):
            flat = torch.addmm(leaf.permute(order).flatten(1), moves, rows)
            carried.append(tree.restore(flat.view(-1, *(leaf.shape[d] for d in order[1:])), order))
        return tree.build(z, carried)

    @property
    def _shared(self) -> list[tuple[list[int], Tensor]]:
        """Of each leaf of a tangent for all samples, its order in storage and its rows in that order, (numbers in x, n)."""
        # a compiled graph finds them once, and can't hold the lock of a cached property
        return self._rows() if torch.compiler.is_compiling() else self._kept_rows

    @cached_property
    def _kept_rows(self) -> list[tuple[list[int], Tensor]]:
        """To find them at every step would take half as long as the step's product."""
        return self._rows()

    def _rows(self) -> list[tuple[list[int], Tensor]]:
        parts = tree.leaves(self.tangent)
        return [(tree.storage_order(part[:, 0]), tree.stack_rows(part)[0]) for part in parts]

    def reduced(self, gradient: Tensor, mu: Tree, moved: Tree) -> Tensor:
        """dcost(z*(x), x)/dx as it is to first order when mu, which a step would move to `moved`, has settled; without a
        tangent `gradient`.

        The adjoint of what `carry` does: J_x^T (1 - J_z)^-T is (dz*/dx)^T.
        """
        if self.tangent is None:
            return gradient
        return gradient + self._pulled(tree.apply(torch.sub, moved, mu)).view_as(gradient)

    def _pulled(self, defect: Tree) -> Tensor:
        """tangent^T defect, (batch, numbers in x)."""
        if tree.batch_size(self.tangent) > 1:
            own = zip(tree.leaves(self.tangent), tree.leaves(defect), strict=True)
            return tree.total([tree.products(part, leaf) for part, leaf in own])
        shared = zip(tree.leaves(defect), self._shared, strict=True)
        return tree.total([leaf.permute(order).flatten(1) @ rows.T for leaf, (order, rows) in shared])

    def rate(self, k: int, lag: Tensor) -> Tensor:
        """Input rate of each sample at step `k`, shape (batch,), given the larger residual of z and mu."""
        # a schedule that reaches 0 would make the relative residual of x, which is divided by the rate, vanish too
        rate = self.rule.rate * max(self.schedule(k), LEAST_MULTIPLIER)
        if self.lag is None:
            return rate * torch.ones_like(lag)
        return rate * (_at(self.lag, k) / lag).clamp_max(1.0)

    def ahead(self, k: int) -> float:
        """How far the direction of step `k` is extrapolated."""
        return _at(self.lookahead, k)

    def select(self, rows: Tensor) -> Step:
        """The step of the samples `rows`."""
        rule = self.x if isinstance(self.x, float | int) else self.x.select(rows)
        tangent = self.tangent
        if tangent is not None and tree.batch_size(tangent) > 1:
            tangent = tree.select(tangent, rows)
        return replace(self, x=rule, tangent=tangent)


def _check_tangent(tangent: Tree, z: Tree, x: Tensor) -> None:
    parts, leaves = tree.leaves(tangent), tree.leaves(z)
    if len(parts) != len(leaves):
        raise ValueError(f"the tangent needs a leaf for each of the {len(leaves)} leaves of z, got {len(parts)}")
    for part, leaf in zip(parts, leaves, strict=True):
        shape = x[0].numel(), *leaf.shape[1:]
        if part.shape[1:] != shape or len(part) not in (1, len(x)) or part.dtype != leaf.dtype:
            raise ValueError(
                f"the tangent of a leaf of z {tuple(leaf.shape)} with respect to x {tuple(x.shape)} has shape "
                f"(batch or 1, {', '.join(map(str, shape))}) and its dtype; got {tuple(part.shape)}, {part.dtype}"
            )
    tree.batch_size(tangent)  # all of them per sample, or none


def _at(value: float | Schedule, k: int) -> float:
    return value if isinstance(value, float | int) else value(k)
