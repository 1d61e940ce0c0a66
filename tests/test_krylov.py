from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jiio.krylov import gmres, minres

DOUBLE = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def indefinite(batch: int = 4, n: int = 20) -> Tensor:
    """Symmetric, eigenvalues of both signs, of another condition in each sample."""
    Q = torch.linalg.qr(draw(batch, n, n)).Q
    spread = torch.linspace(0, 1, n, dtype=DOUBLE)
    values = torch.stack([(10.0**i) ** spread for i in range(batch)]) * torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0)
    return Q @ torch.diag_embed(values) @ Q.mT


def general(batch: int = 4, n: int = 20) -> Tensor:
    return torch.eye(n, dtype=DOUBLE) + 0.15 * draw(batch, n, n, seed=1)


def product(A: Tensor):
    return lambda v: torch.einsum("bij,bj->bi", A, v)


SYSTEMS = {"minres": (minres, indefinite()), "gmres": (gmres, general()), "gmres indefinite": (gmres, indefinite())}
EACH = pytest.mark.parametrize("method, A", SYSTEMS.values(), ids=SYSTEMS)


@EACH
def test_solution_is_that_of_a_dense_solve(method, A: Tensor) -> None:
    b = draw(4, 20, seed=2)
    found = method(product(A), b, tol=1e-11, max_steps=400)
    assert bool(found.converged.all())
    assert torch.allclose(found.value, torch.linalg.solve(A, b), rtol=1e-7, atol=1e-7)


@EACH
def test_a_well_conditioned_system_reaches_rounding(method, A: Tensor) -> None:
    found = method(product(A[:1]), draw(1, 20, seed=2), tol=1e-13, max_steps=400)
    assert float(found.residual.max()) < 1e-12


@EACH
def test_samples_do_not_depend_on_neighbours(method, A: Tensor) -> None:
    b = draw(4, 20, seed=3)
    together = method(product(A), b, tol=1e-12, max_steps=300)
    for i in range(4):
        alone = method(product(A[i : i + 1]), b[i : i + 1], tol=1e-12, max_steps=300)
        assert float((together.value[i] - alone.value[0]).abs().max()) < 1e-10 * max(
            1.0, float(alone.value.abs().max())
        )


@EACH
def test_nan_and_zero_right_hand_sides_stay_where_they_are(method, A: Tensor) -> None:
    b = draw(4, 20, seed=4)
    clean = method(product(A), b, tol=1e-9, max_steps=300)
    b = b.clone()
    b[1], b[2] = torch.nan, 0.0
    found = method(product(A), b, tol=1e-9, max_steps=300)
    assert found.converged.tolist() == [True, False, True, True]
    assert float(found.value[2].abs().max()) == 0
    for i in (0, 3):
        assert float((found.value[i] - clean.value[i]).abs().max()) < 1e-8


@EACH
def test_a_short_budget_is_reported(method, A: Tensor) -> None:
    found = method(product(A), draw(4, 20, seed=5), tol=1e-10, max_steps=3)
    assert not bool(found.converged[1:].any())
    assert bool((found.residual[1:] > 1e-3).all())
    assert bool(found.value.isfinite().all())


@pytest.mark.parametrize("method", [minres, gmres])
def test_an_exhausted_krylov_space_is_a_solution(method) -> None:
    """The identity needs one step, a projector onto its own range too."""
    b = draw(2, 6)
    assert torch.allclose(method(lambda v: 2 * v, b).value, b / 2)
    projector = torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=DOUBLE))
    consistent = b @ projector
    found = method(lambda v: v @ projector, consistent)
    assert bool(found.converged.all())
    assert torch.allclose(found.value @ projector, consistent)


def test_restarted_gmres_converges_too() -> None:
    A, b = general(), draw(4, 20, seed=2)
    found = gmres(product(A), b, tol=1e-10, max_steps=400, restart=6)
    assert torch.allclose(found.value, torch.linalg.solve(A, b), atol=1e-7)


def test_bad_input_is_named() -> None:
    b = torch.ones(2, 3)
    for call, message in [
        (lambda: minres(lambda v: v, b[0]), r"\(batch, n\), got \(3,\)"),
        (lambda: gmres(lambda v: v, b, tol=0.0), "tol must be positive, got 0.0"),
        (lambda: minres(lambda v: v, b, max_steps=0), "max_steps must be at least 1, got 0"),
        (lambda: gmres(lambda v: v, b, restart=0), "restart must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
