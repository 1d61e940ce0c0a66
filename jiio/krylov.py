"""Linear solvers for a batch of systems, each sample on its own: MINRES and restarted GMRES.

`A` maps (batch, n) to (batch, n) and is applied to the whole batch; a finished sample is frozen, so that no sample's
result depends on its neighbours. What is returned is judged by its true residual, measured again at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]
CHECK_EVERY = 5


class LinearSolution(NamedTuple):
    """value: (batch, n).  residual: (batch,), |A value - b| / |b|.  converged: (batch,).  steps: products with A."""

    value: Tensor
    residual: Tensor
    converged: Tensor
    steps: int


def _norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=1)


def _safe(value: Tensor) -> Tensor:
    """`value` with zeros replaced by ones, for divisions whose result is discarded or 0 / 0."""
    return torch.where(value == 0, torch.ones_like(value), value)


def _measured(A: Operator, b: Tensor, value: Tensor, tol: float, steps: int) -> LinearSolution:
    size = _norm(b)
    residual = torch.where(size == 0, torch.zeros_like(size), _norm(A(value) - b) / _safe(size))
    # the recursive residual that stops an iteration and the true one differ by rounding
    return LinearSolution(value, residual, residual <= 2 * tol, steps + 1)


def _check(b: Tensor, tol: float, max_steps: int) -> None:
    if b.dim() != 2:
        raise ValueError(f"the right-hand side has shape (batch, n), got {tuple(b.shape)}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")


def minres(A: Operator, b: Tensor, *, tol: float = 1e-6, max_steps: int = 200) -> LinearSolution:
    """Solve A value = b for a symmetric A that may be indefinite (MINRES, Paige and Saunders 1975).

    b: (batch, n).  tol: relative residual.  A zero right-hand side gives zero.

    >>> A = torch.tensor([[2.0, 0.0], [0.0, -1.0]])
    >>> minres(lambda v: v @ A, torch.tensor([[2.0, 1.0]])).value
    tensor([[ 1., -1.]])
    """
    _check(b, tol, max_steps)
    beta1 = _norm(b)
    x, w, w_old = torch.zeros_like(b), torch.zeros_like(b), torch.zeros_like(b)
    v_old, v = torch.zeros_like(b), b / _safe(beta1)[:, None]
    beta, eta = torch.zeros_like(beta1), beta1
    c_old, c = torch.ones_like(beta1), torch.ones_like(beta1)
    s_old, s = torch.zeros_like(beta1), torch.zeros_like(beta1)
    done = (beta1 == 0) | ~beta1.isfinite()
    steps = 0
    for steps in range(1, max_steps + 1):
        product = A(v) - beta[:, None] * v_old
        alpha = torch.linalg.vecdot(v, product)
        product = product - alpha[:, None] * v
        beta_new = _norm(product)
        # two Givens rotations bring the new column of the tridiagonal matrix to upper triangular form
        delta = c * alpha - c_old * s * beta
        rho2 = s * alpha + c_old * c * beta
        rho3 = s_old * beta
        rho1 = torch.hypot(delta, beta_new)
        c_new, s_new = delta / _safe(rho1), beta_new / _safe(rho1)
        w_new = (v - rho3[:, None] * w_old - rho2[:, None] * w) / _safe(rho1)[:, None]
        x_new = x + (c_new * eta)[:, None] * w_new
        # a singular, consistent system ends with rho1 = 0: the iterate before it is the solution
        x = torch.where((done | (rho1 == 0))[:, None], x, x_new)
        eta = -s_new * eta
        done = done | (eta.abs() <= tol * beta1) | (rho1 == 0) | (beta_new == 0) | ~eta.isfinite()
        v_old, v, beta = v, product / _safe(beta_new)[:, None], beta_new
        w_old, w, c_old, c, s_old, s = w, w_new, c, c_new, s, s_new
        if steps % CHECK_EVERY == 0 and bool(done.all()):
            break
    return _measured(A, b, x, tol, steps)


def gmres(A: Operator, b: Tensor, *, tol: float = 1e-6, max_steps: int = 200, restart: int = 30) -> LinearSolution:
    """Solve A value = b for any A (GMRES, Saad and Schultz 1986), restarted after `restart` products.

    b: (batch, n).  tol: relative residual.  Memory: `restart` + 4 vectors a sample.

    >>> A = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    >>> gmres(lambda v: v @ A.T, torch.tensor([[3.0, 4.0]])).value
    tensor([[1., 2.]])
    """
    _check(b, tol, max_steps)
    if restart < 1:
        raise ValueError(f"restart must be at least 1, got {restart}")
    size = _norm(b)
    x, r = torch.zeros_like(b), b
    done = (size == 0) | ~size.isfinite()
    steps = 0
    while steps < max_steps and not bool(done.all()):
        inner = min(restart, max_steps - steps, b.shape[1])
        change = _cycle(A, r, inner)
        x = torch.where(done[:, None], x, x + change)
        r = b - A(x)
        steps += inner + 1
        done = done | (_norm(r) <= tol * size) | ~_norm(r).isfinite()
    return _measured(A, b, x, tol, steps)


def _cycle(A: Operator, r: Tensor, steps: int) -> Tensor:
    """The correction of one GMRES cycle from residual r: argmin over the Krylov space of |r - A correction|."""
    batch, n = r.shape
    basis = r.new_zeros(batch, steps + 1, n)
    hessenberg = r.new_zeros(batch, steps + 1, steps)
    beta = _norm(r)
    basis[:, 0] = r / _safe(beta)[:, None]
    for j in range(steps):
        w = A(basis[:, j])
        scale = _norm(w)
        for _ in range(2):  # a second pass of Gram-Schmidt keeps the basis orthogonal to rounding
            projection = torch.einsum("bkn,bn->bk", basis[:, : j + 1], w)
            hessenberg[:, : j + 1, j] += projection
            w = w - torch.einsum("bk,bkn->bn", projection, basis[:, : j + 1])
        length = _norm(w)
        # what is left below rounding is no new direction: the Krylov space is exhausted (lucky breakdown)
        length = torch.where(length > 10 * torch.finfo(r.dtype).eps * scale, length, torch.zeros_like(length))
        hessenberg[:, j + 1, j] = length
        basis[:, j + 1] = torch.where((length > 0)[:, None], w / _safe(length)[:, None], torch.zeros_like(w))
    return torch.einsum("bk,bkn->bn", _least_squares(hessenberg, beta), basis[:, :steps])


def _least_squares(hessenberg: Tensor, beta: Tensor) -> Tensor:
    """argmin_y |beta e_1 - H y| of each sample, least norm where H is short of rank."""
    finite = hessenberg.flatten(1).isfinite().all(1) & beta.isfinite()
    H = torch.where(finite[:, None, None], hessenberg, torch.zeros_like(hessenberg))
    rhs = torch.zeros_like(H[:, :, 0])
    rhs[:, 0] = torch.where(finite, beta, torch.zeros_like(beta))
    U, S, V = torch.linalg.svd(H, full_matrices=False)
    keep = 10 * torch.finfo(S.dtype).eps * S.amax(1, keepdim=True) < S
    inverse = torch.where(keep, 1 / torch.where(keep, S, torch.ones_like(S)), torch.zeros_like(S))
    y = torch.einsum("bkj,bk->bj", V, inverse * torch.einsum("bik,bi->bk", U, rhs))
    return torch.where(finite[:, None], y, torch.full_like(y, torch.nan))
