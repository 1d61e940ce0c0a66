"""Keeping a cell contractive that is not so by construction: a penalty on its Jacobian, and its spectral radius."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jiio import tree
from jiio.autodiff import pull, variable
from jiio.tree import Tree


def jacobian_penalty(
    f: Callable[[Tree], Tree], z: Tree, *, probes: int = 1, generator: torch.Generator | None = None,
    draw: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """|J|_F^2 / entries of z -> f(z) at z, (batch,), by Hutchinson's estimate |v^T J|^2 with Gaussian v; differentiable.

    f: the cell at a fixed input; z: tensor or tree. `probes` vectors v are averaged (their spread falls with its root).
    draw: gives v for a leaf of f(z), where not the generator shall.
    (Bai, Koltun, Kolter: Stabilizing equilibrium models by Jacobian regularization, 2021.) Evaluated at a fixed z it is a
    biased surrogate in training: the path through z*(theta) is dropped, no gradient reaches z. ValueError where f changes
    the shape of z.

    >>> jacobian_penalty(lambda z: 2 * z, torch.zeros(3, 5), probes=100).shape
    torch.Size([3])
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    inputs, outputs = _evaluated(f, z)
    entries = sum(leaf[0].numel() for leaf in inputs)
    total = inputs[0].new_zeros(len(inputs[0]))
    for _ in range(probes):
        v = [_normal(leaf, generator) if draw is None else draw(leaf) for leaf in outputs]
        pulled = tuple(pull(outputs, v, inputs, graph=torch.is_grad_enabled(), retain=True))
        total = total + tree.inner(pulled, pulled)
    return total / (probes * entries)


def spectral_radius(
    f: Callable[[Tree], Tree], z: Tree, *, steps: int = 50, generator: torch.Generator | None = None
) -> Tensor:
    """Largest |eigenvalue| of the Jacobian of z -> f(z) at each sample, (batch,): below 1 plain iteration converges.

    The geometric mean growth of a random vector over the second half of `steps` products v^T J: right for complex pairs
    as well. Limits: an estimate, from either side, to some percent (an error of about log(spread) / steps), more where the
    second eigenvalue is close or J is far from normal; no bound; local to z; no gradient. z: tensor or tree. ValueError
    where f changes the shape of z.

    >>> spectral_radius(lambda z: 0.5 * z, torch.zeros(2, 4))
    tensor([0.5000, 0.5000])
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    inputs, outputs = _evaluated(f, z)
    v: Tree = tuple(_normal(leaf, generator) for leaf in outputs)
    growth = inputs[0].new_zeros(len(inputs[0]))
    tiny = torch.finfo(growth.dtype).tiny
    for k in range(steps):
        pulled = tuple(pull(outputs, tree.leaves(v), inputs, retain=True))
        size = tree.norm(pulled)
        start = tree.norm(v)
        if k >= steps // 2:
            growth = growth + (size / start.clamp_min(tiny)).clamp_min(tiny).log()
        v = tuple(part / tree.wide(size.clamp_min(tiny), part) for part in pulled)
    return (growth / (steps - steps // 2)).exp()


def _evaluated(f: Callable[[Tree], Tree], z: Tree) -> tuple[list[Tensor], list[Tensor]]:
    """The leaves of z, of a new graph, and those of f(z) on it; `ValueError` where their shapes differ."""
    z = tree.apply(variable, z)
    with torch.enable_grad():
        inputs, outputs = tree.leaves(z), tree.leaves(f(z))
    given, found = [tuple(leaf.shape) for leaf in inputs], [tuple(leaf.shape) for leaf in outputs]
    if given != found:
        raise ValueError(f"f maps z of shapes {given} to {found}: it must keep them")
    return inputs, outputs


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
