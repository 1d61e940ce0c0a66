"""Captured problems: rows, context and memory with a recording made on the CPU; the CUDA graph itself in test_cuda.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from jiio import Problem, State, solve, tree
from jiio import cuda_graph as module
from jiio.cuda_graph import CapturedProblem, captured
from jiio.tree import Tree
from tests.problems import linear_quadratic


def replayed(function: Callable[[], Tree]) -> tuple[Tree, Callable[[], object]]:
    """What `record` does on a GPU: the outputs keep their place, a replay computes them from the inputs' present values."""
    outputs = function()

    def replay() -> None:
        for place, value in zip(tree.leaves(outputs), tree.leaves(function()), strict=True):
            place.copy_(value)

    return outputs, replay


class OnAnyDevice(CapturedProblem):
    """Recordings without a GPU."""

    def recorded(self, state: State) -> bool:
        return True


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of recordings made so far, as a list that grows."""
    made: list[int] = []

    def record(function: Callable[[], Tree], device: torch.device) -> tuple[Tree, Callable[[], object]]:
        assert device == torch.device("cpu")
        made.append(1)
        return replayed(function)

    monkeypatch.setattr(module, "record", record)
    return made


def in_graph(problem: Problem) -> Problem:
    return OnAnyDevice(problem.f, problem.cost, problem.constraint, problem.context)


def test_a_captured_solve_takes_the_same_steps(recordings: list[int]) -> None:
    """Samples end one after the other, so that rows and context are selected, and recordings made anew."""
    family = linear_quadratic(batch=16)
    start = family.start()
    start = State(start.z, start.mu, torch.linspace(0, 30, 16, dtype=start.x.dtype)[:, None] * torch.ones_like(start.x))
    plain = solve(family.problem(), start, tol=1e-8, max_steps=2000)
    found = solve(in_graph(family.problem()), start, tol=1e-8, max_steps=2000)
    assert bool(plain.converged.all()) and torch.equal(plain.steps, found.steps)
    assert len(plain.steps.unique()) > 2
    assert torch.allclose(plain.value.x, found.value.x, rtol=0, atol=1e-12)
    assert 1 <= len(recordings) <= 5


def test_results_are_not_written_over_by_the_next_replay(recordings: list[int]) -> None:
    problem, start = in_graph(linear_quadratic().problem()), linear_quadratic().start()
    for _ in range(2):
        problem.sweep(start)
    first = problem.sweep(start)
    kept = tree.apply(torch.clone, first)
    problem.sweep(start._replace(x=start.x + 1, mu=start.mu + 1))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(first), tree.leaves(kept), strict=True))
    assert len(recordings) == 1


def test_fewer_rows_use_the_recording_down_to_half(recordings: list[int]) -> None:
    family = linear_quadratic(batch=8)
    problem, start = in_graph(family.problem()), family.start()._replace(x=torch.randn(8, 3, dtype=torch.float64))
    for _ in range(2):
        problem.sweep(start)
    for rows, made in (([6, 1, 3, 0, 7], 1), ([2, 5, 4], 1), ([2, 5, 4], 2), ([5], 2), ([5], 3)):
        some = torch.tensor(rows)
        found = problem.select(some).sweep(tree.select(start, some))
        wanted = family.problem().select(some).sweep(tree.select(start, some))
        for value, right in zip(tree.leaves(found), tree.leaves(wanted), strict=True):
            assert torch.allclose(value, right, rtol=0, atol=1e-12)
        assert len(recordings) == made


def test_what_cannot_be_recorded_is_evaluated_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Callable[[], Tree], device: torch.device) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(module, "record", refuse)
    family = linear_quadratic()
    with pytest.warns(
        UserWarning, match="evaluated as usual: operation not permitted when stream is capturing$"
    ) as told:
        found = solve(in_graph(family.problem()), family.start(), tol=1e-8, max_steps=2000)
    assert len(told) == 1
    assert torch.equal(found.value.x, solve(family.problem(), family.start(), tol=1e-8, max_steps=2000).value.x)


def test_with_a_graph_nothing_is_recorded(recordings: list[int]) -> None:
    problem, start = in_graph(linear_quadratic().problem()), linear_quadratic().start()
    x = start.x.clone().requires_grad_()
    for _ in range(3):
        assert problem.gradients(start._replace(x=x), graph=True).x.requires_grad
    assert not recordings


def test_without_a_gpu_a_problem_stays_what_it_is() -> None:
    problem = linear_quadratic().problem()
    if torch.cuda.is_available():
        assert isinstance(captured(problem), CapturedProblem)
    else:
        assert captured(problem) is problem
