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
    """Row by row: a batched matrix product rounds differently for other batch sizes, and Lanczos amplifies the last bit."""
    return lambda v: (A * v[:, None]).sum(2)


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
def test_other_neighbours_do_not_change_a_bit(method, A: Tensor) -> None:
    b = draw(4, 20, seed=3)
    first = method(product(A), b, tol=1e-9, max_steps=60)
    others, c = A.clone(), b.clone()
    others[1:], c[1:] = 3 * A[1:].flip(0), torch.nan
    assert torch.equal(method(product(others), c, tol=1e-9, max_steps=60).value[0], first.value[0])


@EACH
def test_nan_of_the_operator_stays_in_its_sample(method, A: Tensor) -> None:
    broken = A.clone()
    broken[2] = torch.nan
    found = method(product(broken), draw(4, 20, seed=3), tol=1e-9, max_steps=400)
    assert found.converged.tolist() == [True, True, False, True]


@EACH
def test_residual_is_the_true_one(method, A: Tensor) -> None:
    b = draw(4, 20, seed=6)
    for budget in (4, 400):
        found = method(product(A), b, tol=1e-8, max_steps=budget)
        true = (product(A)(found.value) - b).norm(dim=1) / b.norm(dim=1)
        assert torch.allclose(found.residual, true, rtol=1e-6, atol=1e-14)
        assert found.converged.tolist() == (found.residual <= 1e-8).tolist()


@EACH
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_right_hand_sides_are_solved_in_float32(method, A: Tensor, size: float) -> None:
    """Squares of 1e-30 vanish in float32: the norm would be 0 and the answer a converged zero."""
    b = draw(1, 20, seed=7).float()
    found = method(product(A[:1].float()), size * b, tol=1e-5)
    assert bool(found.converged.all())
    assert torch.allclose(found.value / size, torch.linalg.solve(A[:1].float(), b), atol=1e-3)


@EACH
def test_steps_count_the_products(method, A: Tensor) -> None:
    calls = []

    def counted(v: Tensor) -> Tensor:
        calls.append(1)
        return product(A)(v)

    assert method(counted, draw(4, 20), tol=1e-6).steps == len(calls)


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


@pytest.mark.parametrize("method", [minres, gmres])
def test_a_singular_inconsistent_system_ends_at_its_least_squares(method) -> None:
    Q = torch.linalg.qr(draw(2, 20, 20)).Q
    values = torch.linspace(-2, 3, 20, dtype=DOUBLE)
    values[5:9] = 0
    A, b = Q @ torch.diag(values) @ Q.mT, draw(2, 20, seed=1)
    found = method(product(A), b, tol=1e-8)
    least = (Q[:, :, 5:9].mT @ b[:, :, None]).norm(dim=(1, 2)) / b.norm(dim=1)
    assert not bool(found.converged.any())
    assert torch.allclose(found.residual, least, rtol=1e-6)


def test_a_singular_consistent_system_is_solved_by_minres_to_rounding() -> None:
    Q = torch.linalg.qr(draw(2, 20, 20)).Q
    values = torch.linspace(-2, 3, 20, dtype=DOUBLE)
    values[5:9] = 0
    A = Q @ torch.diag(values) @ Q.mT
    for tol in (1e-6, 1e-12, 1e-30):  # the last is out of reach: it must not spoil the answer
        found = minres(product(A), product(A)(draw(2, 20, seed=1)), tol=tol)
        assert bool((found.residual < max(tol, 1e-14)).all())
        assert bool(found.converged.all()) == (tol > 1e-14)


def test_a_preconditioner_saves_minres_steps_and_keeps_the_solution() -> None:
    values = torch.logspace(0, 5, 20, dtype=DOUBLE) * torch.where(torch.arange(20) % 3 == 0, -1.0, 1.0)
    noise = 0.05 * draw(4, 20, 20)
    A, b = torch.diag(values) + noise + noise.mT, draw(4, 20, seed=1)
    plain = minres(product(A), b, tol=1e-10, max_steps=400)
    better = minres(product(A), b, tol=1e-10, max_steps=400, preconditioner=lambda r: r / values.abs())
    assert bool(better.converged.all())
    assert better.steps < plain.steps / 2
    assert torch.allclose(better.value, torch.linalg.solve(A, b), atol=1e-9)
    with pytest.raises(ValueError, match=r"not positive definite for samples \[0, 1, 2, 3\]"):
        minres(product(A), b, preconditioner=lambda r: r / values)


def test_a_restart_that_brings_nothing_ends_gmres() -> None:
    """A cyclic shift needs all n products: with fewer every restart is the same."""
    shift = torch.roll(torch.eye(8, dtype=DOUBLE), 1, 0)[None]
    first = torch.eye(8, dtype=DOUBLE)[:1]
    assert bool(gmres(product(shift), first, restart=8).converged)
    stuck = gmres(product(shift), first, restart=4, max_steps=1000)
    assert not bool(stuck.converged) and float(stuck.residual) == 1 and stuck.steps < 10


def test_restarted_gmres_converges_too() -> None:
    A, b = general(), draw(4, 20, seed=2)
    found = gmres(product(A), b, tol=1e-10, max_steps=400, restart=6)
    assert torch.allclose(found.value, torch.linalg.solve(A, b), atol=1e-7)


def test_more_products_than_a_block_holds_need_no_restart() -> None:
    """A cyclic shift has its solution in the last of its n directions; the basis is allocated by 30."""
    for n in (31, 60, 70):
        shift, first = torch.roll(torch.eye(n, dtype=DOUBLE), 1, 0)[None], torch.eye(n, dtype=DOUBLE)[:1]
        found = gmres(product(shift), first)
        assert bool(found.converged) and found.steps == n + 1
        assert torch.allclose(product(shift)(found.value), first)


def test_neighbours_that_take_more_blocks_do_not_change_a_bit() -> None:
    A = torch.stack([torch.eye(70, dtype=DOUBLE) + 0.02 * draw(70, 70), torch.roll(torch.eye(70, dtype=DOUBLE), 1, 0)])
    b = torch.stack([draw(70, seed=1), torch.eye(70, dtype=DOUBLE)[0]])
    together, short = gmres(product(A), b), gmres(product(A[[0, 0]]), b[[0, 0]])
    assert short.steps < 25 < 70 < together.steps
    assert torch.equal(together.value[0], short.value[0])


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
