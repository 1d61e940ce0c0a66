"""Slips of the hand are answered by what to do, not by an error from the depths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from jiio import (
    DEQ,
    Adam,
    Anderson,
    Box,
    ConvergenceWarning,
    Delayed,
    Picard,
    Problem,
    State,
    Step,
    fixed_point,
    implicit,
    nested,
    newton_step,
    solve,
)
from tests.problems import SmoothCell, smooth_problem, zeros

EMPTY = "the batch is empty"
PROBLEM = smooth_problem(SmoothCell())
START = zeros(PROBLEM)
X = torch.ones(3, 2)


def nothing() -> tuple[Problem, State]:
    problem = smooth_problem(SmoothCell(), batch=0)
    return problem, zeros(problem)


def scalar_problem() -> Problem:
    return Problem(lambda z, x: 0.5 * z + x, lambda z, x: z.square())


def into(buffer: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda s: torch.add(0.9 * s, 1.0, out=buffer)


SLIPS = {
    "solve nothing": (lambda: solve(*nothing()), EMPTY + r".*\(0, 6\)"),
    "solve nothing by mixing": (lambda: solve(*nothing(), solver=Anderson()), EMPTY),
    "no fixed point": (lambda: fixed_point(torch.cos, torch.zeros(0, 1)), EMPTY),
    "no baseline": (lambda: nested(*nothing()), EMPTY),
    "no step": (lambda: newton_step(*nothing()), EMPTY),
    "no inference": (lambda: DEQ(lambda z, x: x)(torch.zeros(0, 1), torch.zeros(0, 1)), EMPTY),
    "x without entries": (
        lambda: solve(scalar_problem(), scalar_problem().start(torch.zeros(3), torch.zeros(3))),
        r"dimension beside the batch, got shape \(3,\); use x\[:, None\]",
    ),
    "inference without entries": (lambda: DEQ(torch.add)(torch.zeros(3), torch.zeros(3, 1)), "beside the batch"),
    "fixed point without entries": (lambda: fixed_point(torch.cos, torch.zeros(3)), "beside the batch"),
    "bare context": (
        lambda: Problem(PROBLEM.f, PROBLEM.cost, context=torch.zeros(3, 6)),  # type: ignore[arg-type]
        r"give context as a tuple.*\(y,\), not a Tensor",
    ),
    "context in a list": (
        lambda: Problem(PROBLEM.f, PROBLEM.cost, context=[torch.zeros(3, 6)]),  # type: ignore[arg-type]
        "give context as a tuple.*not a list",
    ),
    "weights as context": (lambda: DEQ(lambda z, x, w: z @ w + x)(X, X, torch.eye(2)), "x has 3 samples, context 2"),
    "a step in place": (
        lambda: fixed_point(lambda s: s.mul_(0.5).add_(1.0), X),
        "F changed in place what it was given",
    ),
    "a step into one buffer": (lambda: fixed_point(into(torch.zeros(3, 2)), X), "or what it returned before"),
    "a cell in place": (lambda: DEQ(lambda z, x: z.mul_(0.5).add_(x))(X, X.clone()), "f changed in place"),
    "a context for a set": (
        lambda: Problem(PROBLEM.f, PROBLEM.cost, (X,)),
        "constraint is a set.*give context by name",
    ),  # type: ignore[arg-type]
    "a bare start": (lambda: solve(PROBLEM, tuple(START)), r"problem.start\(x, z\)"),  # type: ignore[arg-type]
    "a leaf for a tree": (
        lambda: fixed_point(lambda s: s[0], (X,)),
        r"return the tree it was given: it got \(tensor,\) and returned tensor",
    ),
    "a class to wait for": (lambda: Delayed(Anderson), r"an instance such as Anderson\(6\)"),  # type: ignore[arg-type]
    "a delay into the past": (lambda: Delayed(after=-1), "at least 0, got -1"),
    "half a step of delay": (lambda: Delayed(after=2.5), "a whole number of steps"),  # type: ignore[arg-type]
    "a measured step in a box": (
        lambda: newton_step(replace(PROBLEM, constraint=Box(0.0, 1.0)), START),
        "a newton_step does not commute with the projection onto Box",
    ),
    "tol in a list": (
        lambda: solve(PROBLEM, START, tol=[1e-3, 1e-2, 1e-2]),  # type: ignore[arg-type]
        r"tol is a number, or of a joint solve a tuple of three; got \[0.001",
    ),
    "tol in words": (lambda: fixed_point(torch.cos, torch.zeros(1, 1), tol="1e-3"), "tol is a number"),  # type: ignore[arg-type]
    "tol of a baseline": (lambda: nested(PROBLEM, START, tol=0.0), "tol must be positive"),
    "half a step": (lambda: solve(PROBLEM, START, max_steps=10.5), "max_steps is a whole number"),  # type: ignore[arg-type]
    "half a round": (lambda: nested(PROBLEM, START, rounds=2.5), "rounds is a whole number"),  # type: ignore[arg-type]
    "an optimiser by name": (
        lambda: nested(PROBLEM, START, optimizer="adam"),  # type: ignore[arg-type]
        r"optimizer is an instance such as Adam\(\).*got 'adam'",
    ),
    "an optimiser's class": (lambda: nested(PROBLEM, START, optimizer=Adam), r"such as Adam\(\)"),  # type: ignore[arg-type]
    "a number as cost": (
        lambda: solve(Problem(PROBLEM.f, lambda z, x, y: 1.0, context=PROBLEM.context), START),  # type: ignore[arg-type]
        r"cost must return a tensor, one number a sample, shape \(3,\); it returned a float",
    ),
    "no cost": (
        lambda: solve(Problem(PROBLEM.f, lambda z, x, y: None, context=PROBLEM.context), START, step=Step(0.1)),  # type: ignore
        "it returned a NoneType",
    ),
    "half an iterate": (lambda: Anderson(2.5), "history is a whole number"),  # type: ignore[arg-type]
    "float32 z": (
        lambda: solve(PROBLEM, PROBLEM.start(START.x, START.z.float())),
        r"x has torch.float64, the leaves of z \[torch.float32\]",
    ),
}


@pytest.mark.parametrize("call, message", SLIPS.values(), ids=SLIPS)
def test_a_slip_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


CALLS = {
    "solve": lambda **options: solve(PROBLEM, START, **options),
    "nested": lambda **options: nested(PROBLEM, START, **options),
    "fixed_point": lambda **options: fixed_point(torch.cos, torch.ones(2, 1), **options),
    "DEQ": lambda **options: DEQ(SmoothCell().f, **options),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("kind", [Picard, Anderson, "anderson"])
def test_a_class_or_a_name_is_no_solver(call, kind: object) -> None:
    with pytest.raises(ValueError, match=r"solver is an instance such as Picard\(\)"):
        call(solver=kind)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("answer", ["error", None, True])
def test_an_unknown_answer_to_failure_is_refused(call, answer: object) -> None:
    with pytest.raises(ValueError, match=f"on_failure is 'warn', 'raise' or 'ignore', got {answer!r}"):
        call(on_failure=answer)


@pytest.mark.parametrize("step", [None, Step(0.1)], ids=["automatic", "scalar"])
@pytest.mark.parametrize("weights", [False, True], ids=["constant", "weights"])
@pytest.mark.parametrize("part", ["f", "cost"])
def test_a_detached_part_is_named_and_not_reported_as_converged(part: str, weights: bool, step: Step | None) -> None:
    """Weights that require grad make it look as if it had a gradient."""
    scale = torch.ones((), requires_grad=weights)

    def f(z: Tensor, x: Tensor) -> Tensor:
        found = 0.5 * z + x
        return scale * (found.detach() if part == "f" else found)

    def cost(z: Tensor, x: Tensor) -> Tensor:
        found = (z - 1).square().sum(1)
        return scale * (found.detach() if part == "cost" else found)

    problem = Problem(f, cost)
    with pytest.raises(ValueError, match=rf"{part}\(z, x\) does not depend"):
        solve(problem, problem.start(torch.zeros(2, 3), torch.zeros(2, 3)), step=step)


def test_an_equilibrium_of_zero_is_reached_and_reported() -> None:
    generator = torch.Generator().manual_seed(0)
    W = 0.7 * torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    U = torch.randn(12, 4, generator=generator)
    problem = Problem(
        lambda z, x: torch.tanh(z @ W.T + x @ U.T), lambda z, x: z.square().sum(1) + 0.1 * x.square().sum(1)
    )
    solution = solve(problem, problem.start(torch.ones(3, 4), torch.zeros(3, 12)), step=Step(0.05))
    assert bool(solution.converged.all())
    assert float(solution.value.x.abs().max()) < 1e-2


def test_implicit_names_an_unknown_answer_to_failure() -> None:
    problem = smooth_problem(SmoothCell())
    solution = solve(problem, zeros(problem), step=Step(0.1), on_failure="ignore")
    with pytest.raises(ValueError, match="on_failure is 'warn'"):
        implicit(solution, on_failure="error")  # type: ignore[arg-type]


def test_counts_of_numpy_are_whole_numbers() -> None:
    solution = solve(PROBLEM, START, max_steps=np.int64(50), solver=Delayed(Anderson(np.int64(4)), after=np.int64(5)))  # type: ignore[arg-type]
    assert bool(solution.converged.all())


def test_what_ran_away_is_not_told_to_take_more_steps() -> None:
    W = 1.5 * torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).Q
    problem = Problem(lambda z, x: z @ W + x, lambda z, x: (z - 1).square().sum(1) + x.square().sum(1))
    with pytest.warns(ConvergenceWarning, match="DIVERGED.*Try: f may be no contraction in z") as caught:
        solve(problem, problem.start(torch.ones(2, 6), torch.ones(2, 6)))
    assert "raise max_steps" not in str(caught[0].message)


def spoiled(sample: int) -> Problem:
    target = PROBLEM.context[0].clone()
    target[sample] = torch.nan
    return replace(PROBLEM, context=(target,))


@pytest.mark.parametrize(
    "f", [PROBLEM.f, lambda z, x, y: torch.tanh(0.5 * z + x.sum(1, keepdim=True) + y)], ids=["cost", "f"]
)
def test_a_newton_step_is_not_measured_on_what_is_not_finite(f: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"not finite for samples \[1\]: measure the step without them"):
        newton_step(replace(spoiled(1), f=f), START)


def test_implicit_says_that_a_sample_that_is_not_finite_must_go() -> None:
    solution = solve(spoiled(2), START, on_failure="ignore")
    with pytest.warns(ConvergenceWarning, match=r"Solve again without samples \[2\]: what is not finite"):
        implicit(solution)
