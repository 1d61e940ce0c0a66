"""Derivatives: the leaves that they are taken in, and one vector-Jacobian product for all of the library."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def variable(value: Tensor) -> Tensor:
    """The numbers of `value` as a leaf of a new graph, to take derivatives in."""
    return value.detach().requires_grad_()


def pull(
    outputs: Sequence[Tensor],
    seeds: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    graph: bool = False,
    retain: bool = False,
    refusal: str | None = None,
) -> list[Tensor]:
    """sum_i (d outputs_i / d inputs)^T seeds_i; zeros for an input that no output depends on.

    graph: the result can be differentiated again.  retain: the same outputs can be pulled back once more.
    refusal: what a `ValueError` says where no output depends on any of the inputs.

    >>> x = torch.ones(2, requires_grad=True)
    >>> pull([3 * x, torch.zeros(2)], [torch.ones(2), torch.ones(2)], [x])
    [tensor([3., 3.])]
    """
    # autograd refuses outputs that depend on nothing, such as a cost that ignores z
    used = [(output, seed) for output, seed in zip(outputs, seeds, strict=True) if output.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if used:
        found = torch.autograd.grad(
            [output for output, _ in used],
            list(inputs),
            [seed for _, seed in used],
            create_graph=graph,
            retain_graph=graph or retain,
            allow_unused=True,
        )
    if refusal is not None and all(part is None for part in found):
        raise ValueError(refusal)
    return [
        torch.zeros_like(leaf, requires_grad=graph) if part is None else part
        for leaf, part in zip(inputs, found, strict=True)
    ]
