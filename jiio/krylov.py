"""Linear solvers for a batch of systems, each sample on its own: MINRES and restarted GMRES.

`A` maps (batch, n) to (batch, n) and is applied to the whole batch, with zeros for samples that are finished, so that no
sample's result depends on its neighbours. Both run in cycles that start from the true residual: what is returned is
judged by it, and where the recursive residual was too hopeful another cycle refines the answer. (An `A` that rounds
differently for another batch size, as batched matrix products do, shifts MINRES's iterates below `tol`: the Lanczos
process amplifies the last bit.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]
Cycle = Callable[[Tensor, Tensor, int], tuple[Tensor, int]]
CHECK_EVERY = 5
# Well-conditioned systems take some 20 vectors; others lose too much at an early restart (46 unknowns of condition 1e3: with
# 30 vectors none of 5 samples converged in 300 products and 3 in 1700, with 46 all in 47). Allocated as they are needed.
RESTART = 100
BLOCK = 30
# Pivots below eps^(2/3) of the operator's size are the null space of a singular system, met through rounding.
SINGULAR = 2 / 3


class LinearSolution(NamedTuple):
    """value: (batch, n).  residual: (batch,), the true |A value - b| / |b|.  converged: (batch,), residual <= tol.

    steps: products with A, those that measured the residual included.
    """

    value: Tensor
    residual: Tensor
    converged: Tensor
    steps: int


def minres(
    A: Operator, b: Tensor, *, tol: float = 1e-6, max_steps: int = 200, preconditioner: Operator | None = None
) -> LinearSolution:
    """Solve A value = b for a symmetric A that may be indefinite (MINRES, Paige and Saunders 1975).

    b: (batch, n).  tol: relative residual.  max_steps: iterations, one product with A each.  preconditioner: r -> about
    |A|^-1 r, linear, symmetric and positive definite, (batch, n) -> (batch, n); `ValueError` where it is seen not to be.
    A zero right-hand side gives zero; a singular system one of its solutions, or its least squares, not converged.

    >>> A = torch.tensor([[2.0, 0.0], [0.0, -1.0]])
    >>> bool(torch.allclose(minres(lambda v: v @ A, torch.tensor([[2.0, 1.0]])).value, torch.tensor([[1.0, -1.0]])))
    True
    """
    _check(b, tol, max_steps)
    M = preconditioner if preconditioner is not None else (lambda r: r)
    return _refined(A, b, tol, max_steps, lambda r, target, steps: _minres_cycle(A, M, r, target, steps))


def gmres(A: Operator, b: Tensor, *, tol: float = 1e-6, max_steps: int = 200, restart: int = RESTART) -> LinearSolution:
    """Solve A value = b for any A (GMRES, Saad and Schultz 1986), restarted after `restart` products.

    b: (batch, n).  tol: relative residual.  max_steps: iterations, one product with A each.  A sample whose restarted
    cycle brings less than 0.1 % is given up: the next would bring no more, a larger `restart` may.  Memory: a vector of
    b's size for each product since the restart, allocated 30 at a time: at most min(`restart`, n) + 4.

    >>> A = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    >>> bool(torch.allclose(gmres(lambda v: v @ A.T, torch.tensor([[3.0, 4.0]])).value, torch.tensor([[1.0, 2.0]])))
    True
    """
    _check(b, tol, max_steps)
    if restart < 1:
        raise ValueError(f"restart must be at least 1, got {restart}")
    width = min(restart, b.shape[1])
    return _refined(A, b, tol, max_steps, lambda r, target, steps: _gmres_cycle(A, r, target, min(steps, width)))


def _check(b: Tensor, tol: float, max_steps: int) -> None:
    if b.dim() != 2:
        raise ValueError(f"the right-hand side has shape (batch, n), got {tuple(b.shape)}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")


def _refined(A: Operator, b: Tensor, tol: float, max_steps: int, cycle: Cycle) -> LinearSolution:
    """Cycles from the true residual until every sample is at `tol`, stalled or out of steps."""
    # a power of two, so exact: squares of gradients below 1e-20 vanish in float32
    largest = b.abs().amax(1, keepdim=True)
    unit = torch.exp2(
        torch.frexp(torch.where((largest > 0) & largest.isfinite(), largest, 1.0)).exponent.to(b.dtype) - 1
    )
    b = b / unit
    size = _norm(b)
    x, r, norm = torch.zeros_like(b), b, size
    done = (size == 0) | ~size.isfinite()
    taken, products, floor = 0, 0, 10 * torch.finfo(b.dtype).eps
    while taken < max_steps and not bool(done.all()):
        # a cycle that aims at tol itself would end just above it by rounding; one that aims below rounding spoils itself
        target = torch.where(done, torch.ones_like(size), 0.5 * tol * size / _safe(norm)).clamp_min(floor)
        change, used = cycle(torch.where(done[:, None], torch.zeros_like(r), r), target, max_steps - taken)
        tried = x + change
        r_tried = b - A(tried)
        better = ~done & (_norm(r_tried) < norm)
        progress = better & (_norm(r_tried) < 0.999 * norm)
        x, r = torch.where(better[:, None], tried, x), torch.where(better[:, None], r_tried, r)
        norm = torch.where(better, _norm(r_tried), norm)
        done = done | (norm <= tol * size) | ~progress
        taken, products = taken + used, products + used + 1
    residual = torch.where(size == 0, torch.zeros_like(size), norm / _safe(size))
    return LinearSolution(x * unit, residual, residual <= tol, products)


def _minres_cycle(A: Operator, M: Operator, r: Tensor, target: Tensor, max_steps: int) -> tuple[Tensor, int]:
    """The correction that makes |r - A correction| small in the norm of M, up to `target` of where it was."""
    eps = torch.finfo(r.dtype).eps
    z = M(r)
    beta1, wrong = _length(r, z)
    x, w, w_old, u_old = (torch.zeros_like(r) for _ in range(4))
    u, z = r / _safe(beta1)[:, None], z / _safe(beta1)[:, None]
    beta, eta = torch.zeros_like(beta1), beta1
    c_old, c, s_old, s = (
        torch.ones_like(beta1),
        torch.ones_like(beta1),
        torch.zeros_like(beta1),
        torch.zeros_like(beta1),
    )
    size, done, steps = torch.zeros_like(beta1), beta1 == 0, 0
    for steps in range(1, max_steps + 1):
        product = A(z)
        alpha = torch.linalg.vecdot(z, product)
        u_new = product - alpha[:, None] * u - beta[:, None] * u_old
        z_new = M(u_new)
        beta_new, negative = _length(u_new, z_new)
        wrong = wrong | (negative & ~done)
        # two Givens rotations bring the new column of the tridiagonal matrix to upper triangular form
        delta, rho2, rho3 = c * alpha - c_old * s * beta, s * alpha + c_old * c * beta, s_old * beta
        size = torch.maximum(size, torch.hypot(torch.hypot(alpha, beta), beta_new))
        rho1 = torch.hypot(delta, beta_new)
        # a singular system ends with rho1 = 0 (consistent) or |A r| = 0 (its least squares), up to rounding: the
        # iterate before that is the solution
        broken = (rho1 <= 10 * eps * size) | (torch.hypot(delta, c * beta_new) <= eps**SINGULAR * size)
        c_new, s_new = delta / _safe(rho1), beta_new / _safe(rho1)
        w_new = (z - rho3[:, None] * w_old - rho2[:, None] * w) / _safe(rho1)[:, None]
        x = torch.where((done | broken)[:, None], x, x + (c_new * eta)[:, None] * w_new)
        eta = -s_new * eta
        done = done | broken | (eta.abs() <= target * beta1) | (beta_new <= 10 * eps * size) | ~eta.isfinite()
        if steps % CHECK_EVERY == 0 and bool(done.all()):
            break
        keep = (~done).to(r.dtype)[:, None]
        u_old, u, z, beta = u, _scaled(u_new, beta_new, keep), _scaled(z_new, beta_new, keep), beta_new
        w_old, w, c_old, c, s_old, s = w, w_new, c, c_new, s, s_new
    if bool(wrong.any()):
        raise ValueError(f"the preconditioner is not positive definite for samples {wrong.nonzero()[:8, 0].tolist()}")
    return x, steps


def _length(u: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt <u, z> with z = M u, and whether <u, z> is negative beyond rounding."""
    square = torch.linalg.vecdot(u, z)
    rounding = 100 * torch.finfo(u.dtype).eps * _norm(u) * _norm(z)
    return square.clamp_min(0).sqrt(), square < -rounding


def _gmres_cycle(A: Operator, r: Tensor, target: Tensor, width: int) -> tuple[Tensor, int]:
    """argmin over the Krylov space of |r - A correction|; the space of each sample ends where it reaches `target`."""
    batch, n = r.shape
    eps = torch.finfo(r.dtype).eps
    basis = [r.new_zeros(batch, min(BLOCK, width), n)]
    R = torch.eye(width, dtype=r.dtype, device=r.device).repeat(batch, 1, 1)
    rotations: list[tuple[Tensor, Tensor]] = []
    g, beta = r.new_zeros(batch, width + 1), _norm(r)
    g[:, 0], basis[0][:, 0] = beta, r / _safe(beta)[:, None]
    done, size, steps = beta == 0, torch.zeros_like(beta), 0
    for j in range(width):
        used = j % BLOCK + 1
        w = A(basis[-1][:, used - 1])
        size = torch.maximum(size, _norm(w))
        column, direction = _arnoldi([*basis[:-1], basis[-1][:, :used]], w)
        for i, (cosine, sine) in enumerate(rotations):
            column[:, i : i + 2] = _rotated(column[:, i], column[:, i + 1], cosine, sine)
        rho = torch.hypot(column[:, j], column[:, j + 1])
        singular = rho <= eps**SINGULAR * size
        rotations.append((column[:, j] / _safe(rho), column[:, j + 1] / _safe(rho)))
        column[:, j] = rho
        # a finished sample keeps the identity's column and a zero: its y is 0 from here on
        growing = ~(done | singular)
        R[:, : j + 1, j] = torch.where(growing[:, None], column[:, : j + 1], R[:, : j + 1, j])
        turned = _rotated(g[:, j], torch.zeros_like(rho), *rotations[-1])
        g[:, j : j + 2] = torch.where(growing[:, None], turned, torch.zeros_like(turned))
        done = ~growing | (g[:, j + 1].abs() <= target * beta) | ~rho.isfinite()
        steps = j + 1
        if steps == width or (steps % CHECK_EVERY == 0 and bool(done.all())):
            break
        if used == BLOCK:
            basis.append(r.new_zeros(batch, min(BLOCK, width - steps), n))
        basis[-1][:, steps % BLOCK] = torch.where(done[:, None], torch.zeros_like(w), direction)
    # over the whole width, unused columns are those of the identity: the order of a sum, and so its last bit, depends on
    # its length, which neighbours would have a say in (not in that of a block; a block more adds zeros)
    y = torch.linalg.solve_triangular(R, g[:, :width, None], upper=True)[:, :, 0]
    parts = zip(y.split(BLOCK, dim=1), basis, strict=False)
    return reduce(torch.add, [torch.einsum("bk,bkn->bn", weights, block) for weights, block in parts]), steps


def _arnoldi(basis: list[Tensor], w: Tensor) -> tuple[Tensor, Tensor]:
    """The column of the Hessenberg matrix of w, and the unit vector that w adds to the basis (blocks of (batch, k, n))."""
    size, column = _norm(w), w.new_zeros(len(w), sum(block.shape[1] for block in basis) + 1)
    for _ in range(2):  # a second pass of Gram-Schmidt keeps the basis orthogonal to rounding
        for block, part in zip(basis, column[:, :-1].split(BLOCK, dim=1), strict=True):
            projection = torch.einsum("bkn,bn->bk", block, w)
            part += projection
            w = w - torch.einsum("bk,bkn->bn", projection, block)
    length = _norm(w)
    # what is left below rounding is no new direction: the Krylov space is exhausted (lucky breakdown)
    column[:, -1] = torch.where(length > 10 * torch.finfo(w.dtype).eps * size, length, torch.zeros_like(length))
    return column, w / _safe(length)[:, None]


def _rotated(upper: Tensor, lower: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    return torch.stack([cosine * upper + sine * lower, cosine * lower - sine * upper], dim=1)


def _norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=1)


def _safe(value: Tensor) -> Tensor:
    """`value` with zeros replaced by ones, for divisions whose result is discarded or 0 / 0."""
    return torch.where(value == 0, torch.ones_like(value), value)


def _scaled(v: Tensor, length: Tensor, keep: Tensor) -> Tensor:
    """v / length, and zero for finished samples: their products with A are of no use, nor may they overflow."""
    return torch.where(keep > 0, v / _safe(length)[:, None], torch.zeros_like(v))
