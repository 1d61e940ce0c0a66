"""Nested tuples of tensors, every leaf with the batch first, as one vector per sample.

A multi-scale equilibrium is a tuple of feature maps; a joint state is a tuple of trees. The solvers only ever need
the few operations below. PyTorch's own pytree module is private, so these functions are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Number = TypeVar("Number", Tensor, float | Tensor)
Tree = Any  # Tensor | tuple[Tree, ...]; a recursive alias defeats both pyright's inference and beartype


def leaves(tree: Tree) -> list[Tensor]:
    """The tensors of `tree`, depth first.

    >>> [t.shape for t in leaves((torch.zeros(2, 3), (torch.zeros(2, 1),)))]
    [torch.Size([2, 3]), torch.Size([2, 1])]
    """
    if isinstance(tree, Tensor):
        return [tree]
    if not isinstance(tree, tuple):
        raise ValueError(f"a tree is a tensor or a tuple of trees, not {type(tree).__name__}")
    return [leaf for branch in tree for leaf in leaves(branch)]


def outline(tree: Tree) -> str:
    """How the leaves of `tree` are nested.

    >>> outline((torch.zeros(1, 1), (torch.zeros(1, 1),)))
    '(tensor, (tensor,))'
    """
    if isinstance(tree, Tensor):
        return "tensor"
    branches = [outline(branch) for branch in tree]
    return f"({branches[0]},)" if len(branches) == 1 else f"({', '.join(branches)})"


def build(tree: Tree, values: list[Tensor]) -> Tree:
    """A tree of the form of `tree` (named tuples keep their type) with `values` as its leaves."""
    values = list(values)
    built = _build(tree, values)
    if values:
        raise ValueError(f"{len(values)} tensors too many for the tree")
    return built


def _build(tree: Tree, values: list[Tensor]) -> Tree:
    if isinstance(tree, Tensor):
        return values.pop(0)
    branches = [_build(branch, values) for branch in tree]
    return type(tree)(*branches) if hasattr(tree, "_fields") else tuple(branches)


def apply(function: Callable[..., Tensor], tree: Tree, *rest: Tree) -> Tree:
    """`function` of the corresponding leaves of one or more trees of one form."""
    return build(tree, [function(*group) for group in zip(*map(leaves, (tree, *rest)), strict=True)])


def batch_size(tree: Tree) -> int:
    """The number of samples; `ValueError` when the leaves disagree."""
    sizes = {leaf.shape[0] if leaf.dim() else None for leaf in leaves(tree)}
    if len(sizes) != 1 or None in sizes:
        shapes = [tuple(leaf.shape) for leaf in leaves(tree)]
        raise ValueError(f"every leaf needs the same batch first; got shapes {shapes}")
    return cast(int, sizes.pop())


def inner(a: Tree, b: Tree) -> Tensor:
    """Inner product of each sample, shape (batch,).

    >>> inner(torch.ones(2, 3), torch.ones(2, 3))
    tensor([3., 3.])
    """
    return total([(u * v).sum(inside(u)) for u, v in zip(leaves(a), leaves(b), strict=True)])


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of what was found of each leaf, tensors of one shape."""
    return parts[0] if len(parts) == 1 else torch.stack(tuple(parts)).sum(0)


def norm(tree: Tree) -> Tensor:
    """Euclidean norm of each sample over all leaves, shape (batch,)."""
    # over dimensions as they are: flattening a channels-last map would copy it
    norms = [torch.linalg.vector_norm(leaf, dim=inside(leaf)) for leaf in leaves(tree)]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)


def inside(leaf: Tensor) -> tuple[int, ...]:
    """The dimensions beside the batch; `ValueError` where there is none."""
    if leaf.dim() == 1:
        raise ValueError(f"a leaf needs a dimension beside the batch, got shape {tuple(leaf.shape)}; use x[:, None]")
    return tuple(range(1, leaf.dim()))


def flatten(tree: Tree) -> Tensor:
    """All leaves side by side, shape (batch, n)."""
    return torch.cat([leaf.flatten(1) for leaf in leaves(tree)], dim=1)


def unflatten(matrix: Tensor, like: Tree) -> Tree:
    """The inverse of `flatten` for a tree of the form and shapes of `like` (views where possible)."""
    parts = leaves(like)
    pieces = matrix.split([part[0].numel() for part in parts], dim=1)
    return build(like, [piece.view(-1, *part.shape[1:]) for piece, part in zip(pieces, parts, strict=True)])


def select(tree: Tree, rows: Tensor) -> Tree:
    """The samples named by `rows` (an index tensor) of every leaf, laid out in storage as they were."""
    return apply(lambda leaf: _select(leaf, rows), tree)


def put(tree: Tree, rows: Tensor, part: Tree) -> Tree:
    """`tree` with the samples `rows` replaced by those of `part`: the inverse of `select`.

    >>> put(torch.zeros(3, 1), torch.tensor([1]), torch.ones(1, 1))[:, 0]
    tensor([0., 1., 0.])
    """
    return apply(lambda whole, some: whole.index_copy(0, rows, some), tree, part)


def _select(leaf: Tensor, rows: Tensor) -> Tensor:
    if leaf.is_contiguous():
        return leaf.index_select(0, rows)
    order = storage_order(leaf)
    return restore(leaf.permute(order).index_select(0, rows), order)


def storage_order(leaf: Tensor) -> list[int]:
    """The dimensions of `leaf`, the batch first, then from the largest stride to the smallest.

    >>> storage_order(torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    [0, 2, 3, 1]
    """
    return [0, *sorted(range(1, leaf.dim()), key=lambda d: -leaf.stride(d))]


def restore(permuted: Tensor, order: list[int]) -> Tensor:
    """The tensor of which `permuted` is `permute(order)`, a view."""
    return permuted.permute([order.index(d) for d in range(len(order))])


def stack_like(leaf: Tensor, count: int) -> Tensor:
    """Zeros (batch, count, ...) in which each of the `count` lies in storage as `leaf` (batch, ...) does."""
    order = [0, 1, *(1 + d for d in storage_order(leaf)[1:])]
    shape = len(leaf), count, *leaf.shape[1:]
    return restore(leaf.new_zeros([shape[d] for d in order]), order)


def stack_rows(stack: Tensor) -> Tensor:
    """A view of `stack` (batch, count, ...) as (batch, count, n), in the order of storage."""
    return stack.permute(0, 1, *(1 + d for d in storage_order(stack[:, 0])[1:])).flatten(2)


def combine(stack: Tensor, weights: Tensor) -> Tensor:
    """sum_i weights_i stack_i of each sample, weights (batch, k) of the first k of `stack` (batch or 1, count, ...).

    >>> combine(torch.eye(2)[None], torch.tensor([[2.0, 3.0]]))
    tensor([[2., 3.]])
    """
    one, order = stack[:, 0], storage_order(stack[:, 0])
    rows = stack_rows(stack)[:, : weights.shape[1]]
    mixed = weights @ rows[0] if len(stack) == 1 else torch.bmm(weights[:, None], rows)
    return restore(mixed.view(-1, *(one.shape[d] for d in order[1:])), order)


def products(stack: Tensor, leaf: Tensor) -> Tensor:
    """The inner products of a leaf (batch, ...) with each of `stack` (batch, count, ...), (batch, count).

    >>> products(torch.eye(2)[None], torch.tensor([[2.0, 3.0]]))
    tensor([[2., 3.]])
    """
    flat = leaf.permute(storage_order(stack[:, 0])).flatten(1)
    return times(stack_rows(stack), flat)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """The products of (batch or 1, n, m) and (batch, m); rows in place of columns take a half to a fifth of the time on a
    CPU."""
    return torch.bmm(vector[:, None], matrix.mT.expand(len(vector), -1, -1))[:, 0]


def where(mask: Tensor, a: Tree, b: Tree) -> Tree:
    """`a` for the samples where `mask` (batch,) holds, else `b`."""
    return apply(lambda u, v: torch.where(wide(mask, u), u, v), a, b)


def lerp(old: Tree, new: Tree, share: float) -> Tree:
    """old + share (new - old); `new` itself for a share of 1."""
    return new if share == 1.0 else apply(lambda a, b: torch.lerp(a, b, share), old, new)


def finite(tree: Tree) -> Tensor:
    """Whether every number of a sample is finite, shape (batch,)."""
    # extremes carry NaN and infinity along, and take a tenth of the time of looking at every number
    parts = [leaf.amax(inside(leaf)).isfinite() & leaf.amin(inside(leaf)).isfinite() for leaf in leaves(tree)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).all(0)


def detach(tree: Tree) -> Tree:
    """The tree without history."""
    return apply(Tensor.detach, tree)


def along(step: Tensor, last: Tensor) -> Tensor:
    """How long `step` (batch, ...) is along `last`, in parts of that, (batch,); 0 where `last` is 0.

    >>> along(torch.tensor([[1.0, 5.0]]), torch.tensor([[2.0, 0.0]]))
    tensor([0.5000])
    """
    size = last.flatten(1).square().sum(1)
    return (step * last).flatten(1).sum(1) / size.clamp_min(torch.finfo(size.dtype).tiny)


def wide(value: float | Tensor, like: Tensor) -> Tensor:
    """A number, or one a sample (batch,), in a shape that multiplies `like` (batch, ...).

    >>> wide(torch.ones(3), torch.zeros(3, 2, 2)).shape
    torch.Size([3, 1, 1])
    """
    value = torch.as_tensor(value)
    return value.view(-1, *[1] * (like.dim() - 1)) if value.dim() else value


def rows_of(value: Number, rows: Tensor) -> Number:
    """The rows of what is per sample, (batch, ...); a number, or one entry for all samples, as it is.

    >>> rows_of(torch.tensor([1.0, 2.0]), torch.tensor([1])), rows_of(3.0, torch.tensor([1]))
    (tensor([2.]), 3.0)
    """
    return value[rows] if isinstance(value, Tensor) and value.dim() and len(value) > 1 else value
