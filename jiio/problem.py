"""The problem: minimise cost(z, x) over x in X subject to z = f(z, x), and its Lagrangian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jiio import tree
from jiio.autodiff import pull, variable
from jiio.constraint import Constraint, Free
from jiio.fixed_point import check_start
from jiio.tree import Tree


class State(NamedTuple):
    """A joint iterate. z: equilibrium, a tree; mu: multiplier, of the form of z; x: the input, (batch, ...)."""

    z: Tree
    mu: Tree
    x: Tensor


class Gradients(NamedTuple):
    """One evaluation of the problem at a state: f, cost, and the gradient of the Lagrangian but for -mu in z."""

    f: Tree
    cost: Tensor
    z: Tree
    x: Tensor


class Sweep(NamedTuple):
    """f(z, x), cost(f, x), a = mu + dcost/df, J_z^T a and J_x^T a + dcost/dx (`Problem.sweep`)."""

    f: Tree
    cost: Tensor
    adjoint: Tree
    mu: Tree
    x: Tensor


@dataclass(frozen=True)
class Problem:
    """minimise over x in `constraint`: cost(z, x)  subject to  z = f(z, x).   (JIIO paper, arXiv 2111.13236)

    f(z, x, *context) returns a tree of the shapes and dtypes of z; cost(z, x, *context) has shape (batch,). One batch
    element is one independent problem. Give everything that belongs to a sample (targets, masks, labels) as `context`,
    each leaf with the batch first: the library then takes finished samples out of the batch. Data hidden in a closure
    are still solved right, but every sample is computed until the last one is done.
    compute_dtype: f is called with z, x and float context in this dtype and its result is cast back (bfloat16 cell,
    float32 iteration).

    >>> problem = Problem(lambda z, x, y: z.tanh() + x, lambda z, x, y: (z - y).square().sum(1), context=(torch.ones(4, 3),))
    >>> problem.lagrangian(State(torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4, 3)))
    tensor([3., 3., 3., 3.])
    """

    f: Callable[..., Tree]
    cost: Callable[..., Tensor]
    constraint: Constraint = Free()
    context: tuple[Any, ...] = ()
    compute_dtype: torch.dtype | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.context, tuple):
            kind = type(self.context).__name__
            raise ValueError(f"give context as a tuple, one entry for each argument of f after x: (y,), not a {kind}")
        if not isinstance(self.constraint, Constraint):
            raise ValueError(
                f"constraint is a set such as Box(0.0, 1.0), got {type(self.constraint).__name__}; give context by name: "
                "Problem(f, cost, context=(y,))"
            )

    def start(self, x: Tensor, z: Tree) -> State:
        """A state at `x` with equilibrium guess `z` and multiplier 0."""
        return State(z, tree.apply(torch.zeros_like, z), x)

    def evaluate(self, z: Tree, x: Tensor) -> Tree:
        """f(z, x), in `compute_dtype` where one is declared."""
        if self.compute_dtype is None:
            return self.f(z, x, *self.context)
        low = self.compute_dtype

        def cast(leaf: Tensor) -> Tensor:
            return leaf.to(low) if leaf.is_floating_point() else leaf

        fz = self.f(tree.apply(cast, z), cast(x), *(tree.apply(cast, part) for part in self.context))
        return tree.apply(lambda leaf, like: leaf.to(like.dtype), fz, z)

    def lagrangian(self, state: State) -> Tensor:
        """L = cost(z, x) + <mu, f(z, x) - z>, shape (batch,), with graph.

        At a converged solution of a smooth problem its gradient in any parameter of f or cost, with the state held
        constant, is the gradient of the optimal cost (envelope theorem): no further solve. It is not where the solve did
        not converge, or at a kink of a ReLU cell, where no stationary state exists.
        """
        z, mu, x = state
        defect = tree.apply(torch.sub, self.evaluate(z, x), z)
        return self.cost(z, x, *self.context) + tree.inner(mu, defect)

    def gradients(self, state: State, *, graph: bool = False) -> Gradients:
        """f, cost, J_z^T mu + dcost/dz and J_x^T mu + dcost/dx from one forward and one backward pass.

        With `graph` the result can be differentiated again, in the state's tensors too; without, nothing is kept.
        """
        prepare = _differentiable if graph else variable
        z, x = tree.apply(prepare, state.z), prepare(state.x)
        with torch.enable_grad():
            fz = self.evaluate(z, x)
            cost = self.cost(z, x, *self.context)
        _require_graph(fz, cost)
        # seeding f with mu and cost with 1 is the gradient of the Lagrangian without forming <mu, f - z>
        outputs = [*tree.leaves(fz), cost]
        seeds = [*tree.leaves(state.mu), torch.ones_like(cost)]
        gradients = pull(outputs, seeds, [*tree.leaves(z), x], graph=graph)
        if not graph:
            fz, cost = tree.detach(fz), cost.detach()
        return Gradients(fz, cost, tree.build(state.z, gradients[:-1]), gradients[-1])

    def sweep(self, state: State) -> Sweep:
        """The same from the newest of everything (in the order of Gauss and Seidel): f(z, x), the cost of that instead of z,
        the adjoint a = mu + dcost/dz with its slope, and with that J_z^T a and J_x^T a + dcost/dx. No graph is kept.

        So mu is here the part of the adjoint that comes through f, a fixed point of mu -> J_z^T (mu + dcost/dz). The price is
        that of `gradients`; z and the adjoint are both one step further.
        """
        z, x = tree.apply(variable, state.z), variable(state.x)
        with torch.enable_grad():
            fz = self.evaluate(z, x)
            # a leaf of its own: a compiled cost warns of one that has a history
            seen = tree.apply(variable, fz)
            cost = self.cost(seen, x, *self.context)
        self.check_cost(cost, len(x))
        # that they require grad, as weights do too, is not enough
        *slope, own = pull([cost], [torch.ones_like(cost)], [*tree.leaves(seen), x], refusal=_detached("cost"))
        adjoint = tree.apply(torch.add, state.mu, tree.build(state.mu, slope))
        *pulled, through = pull(tree.leaves(fz), tree.leaves(adjoint), [*tree.leaves(z), x], refusal=_detached("f"))
        return Sweep(tree.detach(fz), cost.detach(), adjoint, tree.build(state.mu, pulled), through + own)

    def select(self, rows: Tensor) -> Problem:
        """The problem of the samples `rows`."""
        context = tuple(tree.select(part, rows) for part in self.context)
        return replace(self, constraint=self.constraint.select(rows), context=context)

    def check(self, start: State) -> None:
        """`ValueError`, naming shapes and values, for a start that does not fit; f and the cost are checked when they are
        first evaluated."""
        if not isinstance(start, State):
            raise ValueError(f"give the start as problem.start(x, z) or State(z, mu, x), not a {type(start).__name__}")
        check_start(start)
        dtypes = [leaf.dtype for leaf in tree.leaves(start.z)]
        if any(dtype != start.x.dtype for dtype in dtypes):
            raise ValueError(
                f"z and x need one dtype: x has {start.x.dtype}, the leaves of z {dtypes}; cast one of them"
            )
        form, given = map(_form, (start.z, start.mu))
        if form != given:
            raise ValueError(f"mu has the form of z, {form}; got {given}. problem.start(x, z) gives one of zeros")
        self.check_context(tree.batch_size(start))

    def check_context(self, batch: int) -> None:
        """`ValueError` for a context that does not have `batch` samples."""
        for part in self.context:
            if tree.batch_size(part) != batch:
                raise ValueError(
                    f"every leaf of context needs the batch first: x has {batch} samples, context {tree.batch_size(part)}; "
                    "what all samples share belongs into f"
                )

    def check_cost(self, cost: Tensor, batch: int) -> None:
        """`ValueError` unless `cost` is a float for each of `batch` samples."""
        if not isinstance(cost, Tensor):
            kind = type(cost).__name__
            raise ValueError(f"cost must return a tensor, one number a sample, shape {(batch,)}; it returned a {kind}")
        if cost.shape != (batch,):
            raise ValueError(f"cost must return one number a sample, shape {(batch,)}; it returned {tuple(cost.shape)}")
        if not cost.is_floating_point():
            raise ValueError(f"cost must return floats, got {cost.dtype}")


def _form(part: Tree) -> tuple[str, list[tuple[tuple[int, ...], torch.dtype]]]:
    return tree.outline(part), [(tuple(leaf.shape), leaf.dtype) for leaf in tree.leaves(part)]


def _detached(name: str) -> str:
    return f"{name}(z, x) does not depend on z or x as autograd sees it: is it under no_grad or inference_mode, or detached?"


def _require_graph(fz: Tree, cost: Tensor) -> None:
    """`ValueError` for an f or a cost whose gradient would silently be 0."""
    if not any(leaf.requires_grad for leaf in tree.leaves(fz)):
        raise ValueError(_detached("f"))
    if not cost.requires_grad:
        raise ValueError(_detached("cost"))


def _differentiable(value: Tensor) -> Tensor:
    return value if value.requires_grad else variable(value)
