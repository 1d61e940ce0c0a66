from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from jiio import (
    DEQ,
    Accelerated,
    Anderson,
    Broyden,
    ConvergenceWarning,
    Delayed,
    Diagonal,
    Matrix,
    NotConverged,
    Picard,
    Problem,
    State,
    Status,
    Step,
    solve,
    tree,
)
from jiio.book import Evaluation
from jiio.joint import cost_slope, without_slope
from jiio.solution import Work
from tests.problems import D, N, SmoothCell, linear_quadratic, smooth_problem, zeros

SOLVERS = {
    "picard": Picard(),
    "anderson": Anderson(history=10),
    "delayed": Delayed(Anderson(history=10), after=5),
    "accelerated": Delayed(Accelerated(), after=3),
    "broyden": Broyden(history=40),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_linear_quadratic_problem_is_solved_to_its_closed_form(solver) -> None:
    exact = linear_quadratic()
    problem = exact.problem()
    solution = solve(problem, exact.start(), step=Step(0.02), solver=solver, max_steps=20000, tol=1e-11)
    assert bool(solution.converged.all())
    for found, expected in zip(solution.value, exact.solution(), strict=True):
        assert float((found - expected).abs().max()) < 1e-8


def test_the_automatic_step_solves_the_linear_quadratic_problem() -> None:
    exact = linear_quadratic()
    solution = solve(exact.problem(), exact.start(), tol=1e-10, max_steps=1000)
    assert float((solution.value.x - exact.solution().x).abs().max()) < 1e-8
    assert int(solution.steps.max()) < 300


def test_parameter_gradient_of_the_linear_quadratic_problem_is_closed_form() -> None:
    """d cost* / d c = (I - A)^-T (dcost/dz), which is mu*."""
    exact = linear_quadratic()
    c = exact.c.clone().requires_grad_()
    solution = solve(exact.problem(c), exact.start(), step=Step(0.02), max_steps=20000, tol=1e-11)
    (gradient,) = torch.autograd.grad(exact.problem(c).lagrangian(solution.value).sum(), c)
    assert float((gradient - exact.solution().mu.sum(0)).abs().max()) < 1e-8


def assert_equal_to_single(problem: Problem, tolerance: float, **options) -> None:
    start = zeros(problem)
    together = solve(problem, start, on_failure="ignore", **options)
    for i in range(len(start.x)):
        row = torch.tensor([i])
        alone = solve(problem.select(row), tree.select(start, row), on_failure="ignore", **options)
        for a, b in zip(tree.leaves(tree.select(together.value, row)), tree.leaves(alone.value), strict=True):
            assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))
        assert int(together.status[i]) == int(alone.status[0])


PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("max_steps", [13, 60])
@pytest.mark.parametrize("step", [None, Step(0.05)], ids=["automatic", "scalar"])
def test_batch_solve_equals_single_solves_at_any_budget(dtype, tolerance: float, max_steps: int, step) -> None:
    problem = smooth_problem(SmoothCell(dtype=dtype), batch=6)
    assert_equal_to_single(problem, tolerance, step=step, max_steps=max_steps)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("name, single_tol", [("anderson", 4e-6), ("accelerated", 4e-6), ("broyden", 1e-6)])
def test_mixed_batch_solve_equals_single_solves(dtype, tolerance: float, name: str, single_tol: float) -> None:
    """At convergence: before it, extrapolation amplifies the last bit in which a matrix product depends on its batch."""
    exact = linear_quadratic(batch=6, dtype=dtype)
    # the last bit of x over the rate 0.05 is 2e-6 in float32: below that a mixed sample converges or stalls by chance
    tol = 1e-12 if dtype == torch.float64 else (1e-6, 1e-6, single_tol)
    problem = exact.problem()
    assert_equal_to_single(problem, tolerance, solver=SOLVERS[name], step=Step(0.05), max_steps=300, tol=tol)


def test_a_sample_that_runs_away_changes_none_that_converges_at_the_same_look() -> None:
    """Its z is brought up to date before it is returned; that of the others, here just below its tolerance, is not."""
    gain = torch.linspace(0.3, 0.8, 400, dtype=torch.float64)[:, None]
    gain[-1] = 2.0
    problem = Problem(lambda z, x, q: q * z + x, lambda z, x, q: (x - 1).square().sum(1), context=(gain,))
    start = problem.start(torch.linspace(0.5, 0.995, 400, dtype=torch.float64)[:, None], torch.ones_like(gain))
    rows = torch.arange(399)
    options = {"step": Step(0.1, lag=None), "on_failure": "ignore"}
    together = solve(problem, start, **options)
    apart = solve(problem.select(rows), tree.select(start, rows), **options)
    assert together.status[-1] == Status.DIVERGED
    assert int((apart.steps == together.steps[-1]).sum()) > 100
    assert torch.equal(together.status[rows], apart.status) and torch.equal(together.residual[rows], apart.residual)
    for a, b in zip(tree.select(together.value, rows), apart.value, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_nan_sample_is_reported_and_changes_no_other(solver) -> None:
    problem = smooth_problem(SmoothCell(), batch=4)
    clean = solve(
        problem, zeros(problem), solver=solver, step=Step(0.05), max_steps=300, tol=1e-12, on_failure="ignore"
    )
    target = problem.context[0].clone()
    target[1] = torch.nan
    spoiled = Problem(problem.f, problem.cost, context=(target,))
    solution = solve(
        spoiled, zeros(problem), solver=solver, step=Step(0.05), max_steps=300, tol=1e-12, on_failure="ignore"
    )
    assert solution.status[1] == Status.NON_FINITE
    assert bool(tree.finite(solution.value).all())
    others = torch.tensor([0, 2, 3])
    for a, b in zip(solution.value, clean.value, strict=True):
        assert float((a[others] - b[others]).abs().max()) < 1e-10


def test_converged_samples_cost_nothing_more_once_most_of_the_batch_is_done() -> None:
    problem = smooth_problem(SmoothCell(), batch=16)
    solution = solve(problem, zeros(problem), max_steps=1000, tol=1e-6)
    restart = State(*(v.clone() for v in solution.value))
    restart.x[0] += 0.5
    rows: list[int] = []
    again = solve(
        problem,
        restart,
        step=Step(0.05),
        max_steps=2000,
        tol=2e-5,
        callback=lambda k, s, now: rows.append(len(s.x)),
    )
    assert bool(again.converged.all())
    assert rows[0] == 16
    assert rows[-1] == 1
    assert again.work.cost_grad == sum(rows) + 16  # and the slope at the start, which has a multiplier
    assert sum(rows) < 3 * (len(rows) + 16)


def test_solve_builds_no_graph_and_leaves_no_gradient() -> None:
    cell = SmoothCell()
    problem = smooth_problem(cell)
    solution = solve(problem, zeros(problem), max_steps=20, on_failure="ignore")
    assert not any(leaf.requires_grad for leaf in tree.leaves(solution.value))
    assert not solution.cost.requires_grad
    assert all(parameter.grad is None for parameter in cell.parameters())


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_peak_memory_does_not_grow_with_max_steps(solver) -> None:
    problem = smooth_problem(SmoothCell(), batch=64)

    def peak(max_steps: int) -> int:
        counts: list[int] = []

        def count(k: int, s: object, now: object) -> None:
            if k % 5 == 4:
                counts.append(sum(t.numel() for t in gc.get_objects() if type(t) is Tensor))

        gc.collect()
        options = {"tol": 1e-12, "callback": count, "on_failure": "ignore"}
        solve(problem, zeros(problem), step=Step(1e-4), solver=solver, max_steps=max_steps, **options)
        return max(counts)

    peak(20)
    assert peak(200) <= 1.02 * peak(20)


def test_no_convergence_warns_with_count_worst_block_and_remedy() -> None:
    problem = smooth_problem(SmoothCell())
    with pytest.warns(
        ConvergenceWarning,
        match=r"3 of 3 samples did not converge \(3 BUDGET\); worst block x.*Try: the input still moves",
    ):
        solve(problem, zeros(problem), step=Step(0.01), max_steps=5)


def test_raise_carries_the_solution() -> None:
    problem = smooth_problem(SmoothCell())
    with pytest.raises(NotConverged) as caught:
        solve(problem, zeros(problem), step=Step(0.01), max_steps=5, on_failure="raise")
    assert caught.value.solution.value.x.shape == (3, D)


def test_no_sample_ends_worse_than_its_start() -> None:
    """A step far too long: costs rise, and the start is handed back."""
    exact = linear_quadratic()
    problem, start = exact.problem(), exact.start()
    solution = solve(problem, start, step=Step(50.0, lag=None), max_steps=30, on_failure="ignore")
    at_start = _cost_at(exact, start.x)
    assert bool((_cost_at(exact, solution.value.x) <= at_start + 1e-9).all())
    assert not bool(solution.converged.any())


def _cost_at(exact, x: Tensor) -> Tensor:
    z = torch.linalg.solve(torch.eye(N, dtype=x.dtype) - exact.A, (x @ exact.B.T + exact.c).T).T
    problem = exact.problem()
    return problem.cost(z, x, *problem.context)


def test_the_returned_residual_is_that_of_the_returned_state() -> None:
    problem = smooth_problem(SmoothCell())
    seen: list[Evaluation] = []
    options = {"max_steps": 37, "tol": 1e-9, "on_failure": "ignore", "callback": lambda k, s, now: seen.append(now)}
    solution = solve(problem, zeros(problem), step=Step(0.1), **options)
    ahead = solution.value._replace(z=problem.evaluate(solution.value.z, solution.value.x))
    slope = cost_slope(problem, ahead, work=Work())
    again = solution.map.measure(without_slope(solution.value, slope))
    counted = torch.stack(
        (torch.ones(3), torch.ones(3), seen[-1].remaining), dim=1
    )  # steps that shrink slowly count for more
    assert torch.allclose(again.residual * counted, solution.residual, rtol=1e-6)
    assert bool((counted >= 1).all())


def test_a_multi_scale_state_is_solved_like_a_flat_one() -> None:
    exact = linear_quadratic()
    flat = exact.problem()

    def split(z: Tensor):
        return (z[:, :2], (z[:, 2:],))

    def f(z, x: Tensor, y: Tensor):
        return split(flat.f(tree.flatten(z), x, y))

    problem = Problem(f, lambda z, x, y: flat.cost(tree.flatten(z), x, y), context=flat.context)
    start = problem.start(zeros(flat).x, split(zeros(flat).z))
    for solver in SOLVERS.values():
        a = solve(problem, start, step=Step(0.05), solver=solver, tol=1e-9, max_steps=3000)
        assert float((a.value.x - exact.solution().x).abs().max()) < 1e-7


def test_a_bfloat16_cell_is_mixed_in_float32() -> None:
    cell = SmoothCell(dtype=torch.float32)
    low = SmoothCell(dtype=torch.float32).to(torch.bfloat16)
    target = smooth_problem(cell).context
    problem = Problem(low.f, cell.cost, context=target, compute_dtype=torch.bfloat16)
    reference = smooth_problem(cell)
    a = solve(problem, zeros(reference), step=Step(0.05), tol=1e-2, max_steps=400, on_failure="ignore")
    b = solve(reference, zeros(reference), tol=1e-4, on_failure="ignore")
    assert a.value.z.dtype == torch.float32
    # x is badly determined along flat directions, where rounding to bfloat16 moves it by 0.1; its cost is not
    best = reference.cost(b.value.z, b.value.x, *reference.context)
    resolved = DEQ(reference.f, tol=1e-6)(a.value.x, b.value.z, *reference.context)
    reached = reference.cost(resolved, a.value.x, *reference.context)
    assert bool((reached < 1.01 * best).all())


def bad(f=None, cost=None, context=None):
    problem = smooth_problem(SmoothCell())
    return Problem(f or problem.f, cost or problem.cost, context=context or problem.context)


def test_bad_input_is_named() -> None:
    problem = smooth_problem(SmoothCell())
    start = zeros(problem)
    cases = [
        (lambda: solve(bad(f=lambda z, x, y: z[:, :2]), start), r"f must return the shape.*\(3, 6\).*\(3, 2\)"),
        (lambda: solve(bad(f=lambda z, x, y: z.float()), start), "float64.*float32.*compute_dtype"),
        (lambda: solve(bad(cost=lambda z, x, y: z.sum()), start), r"cost must return.*\(3,\).*\(\)"),
        (
            lambda: solve(problem, start._replace(x=torch.zeros(3, D, dtype=torch.long))),
            "float tensor, got torch.int64",
        ),
        (lambda: solve(problem, start._replace(x=start.x / 0)), r"NaN or infinity in samples \[0, 1, 2\]"),
        (lambda: solve(problem, start._replace(mu=start.mu[:, :2])), r"mu.*\(3, 6\).*\(3, 2\)"),
        (lambda: solve(problem, start._replace(x=start.x[:2])), r"same batch.*\(2, 3\)"),
        (lambda: solve(bad(context=(torch.zeros(2, N),)), start), "x has 3 samples, context 2"),
        (lambda: solve(problem, start, tol=0.0), "tol must be positive"),
        (lambda: solve(problem, start, tol=(1e-3, -1.0, 1e-2)), "tol must be positive"),
        (lambda: solve(problem, start, max_steps=0), "max_steps is a whole number and must be at least 1, got 0"),
        (lambda: Anderson(history=0), "history is a whole number and must be at least 1, got 0"),
        (lambda: Broyden(history=0), "history is a whole number and must be at least 1, got 0"),
        (lambda: Picard(damping=1.5), r"damping must lie in \(0, 1\], got 1.5"),
        (lambda: Step(-0.1), "rate of an input step must be positive, got -0.1"),
        (lambda: Step(0.1, z=2.0), r"damping of z.*2.0"),
        (lambda: Matrix(torch.zeros(3, 2)), r"shape \(d, d\).*\(3, 2\)"),
        (lambda: Diagonal(torch.zeros(1, 3)), "must be positive"),
        (lambda: solve(problem, start, step=Step(Matrix(torch.eye(5, dtype=torch.float64)))), r"\(5, 5\).*\(3, 3\)"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_problem_gives_the_same_solution() -> None:
    """In one graph each for f and cost; the backend without code generation, which needs no C++ compiler."""
    problem = smooth_problem(SmoothCell())
    compiled = Problem(
        torch.compile(problem.f, fullgraph=True, backend="aot_eager"),
        torch.compile(problem.cost, fullgraph=True, backend="aot_eager"),
        context=problem.context,
    )
    a, b = (solve(each, zeros(problem), step=Step(0.1), tol=1e-6, max_steps=2000) for each in (problem, compiled))
    assert float((a.value.x - b.value.x).abs().max()) < 1e-10
