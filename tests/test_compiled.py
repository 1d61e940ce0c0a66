"""`solve(compiled=True)`: the same solve in graphs of torch.compile. With the backend that needs no C++ compiler."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from jiio import Box, Intersection, L2Ball, Problem, Solution, State, Step, implicit, newton_step, solve
from jiio import graph as graphs
from tests.problems import linear_quadratic

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "BACKEND", "aot_eager")


def pair(problem: Problem, start: State, step: Step | None) -> tuple[Solution[State], Solution[State]]:
    """The solve as usual and compiled."""
    usual, compiled = (solve(problem, start, step=step, tol=1e-7, max_steps=3000, compiled=c) for c in (False, True))
    return usual, compiled


@pytest.mark.parametrize("rule", ["rate", "matrices", "mean matrix"])
def test_the_same_steps_to_the_same_point(rule: str) -> None:
    exact = linear_quadratic()
    problem, start = exact.problem(), exact.start()
    steps = {"rate": Step(0.02), "matrices": None, "mean matrix": newton_step(problem, start)}
    usual, compiled = pair(problem, start, steps[rule])
    assert bool(compiled.converged.all())
    assert usual.steps.tolist() == compiled.steps.tolist()
    assert float((compiled.value.x - exact.solution().x).abs().max()) < 1e-6
    assert float((usual.value.x - compiled.value.x).abs().max()) < 1e-12


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch's own backend needs a C++ compiler")
def test_the_same_steps_with_the_backend_that_users_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "BACKEND", "inductor")
    exact = linear_quadratic()
    before = counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"]
    usual, compiled = pair(exact.problem(), exact.start(), Step(0.02))
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"] > before
    assert bool(compiled.converged.all()) and not counters["graph_break"]
    assert usual.steps.tolist() == compiled.steps.tolist()
    assert float((usual.value.x - compiled.value.x).abs().max()) < 1e-10


@pytest.mark.parametrize(
    "constraint", [Box(-0.1, 0.1), Intersection(L2Ball(torch.zeros(1, 3).double(), 0.1), Box(-0.07, 0.07))]
)
def test_within_a_set(constraint: Box | Intersection) -> None:
    exact = linear_quadratic()
    usual, compiled = pair(exact.problem(constraint=constraint), exact.start(), Step(0.02))
    assert bool(compiled.converged.all()) and float(compiled.value.x.abs().max()) <= 0.1
    assert float((usual.value.x - compiled.value.x).abs().max()) < 1e-12


def some_harder(batch: int = 8) -> tuple[Problem, State]:
    """Of which one sample takes many more steps than the others."""
    y = torch.ones(batch, 2, dtype=torch.float64)
    y[3] = 30.0

    def f(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * z.tanh() + x

    problem = Problem(f, lambda z, x, y: (z - y).square().sum(1), context=(y,))
    return problem, problem.start(torch.zeros_like(y), torch.zeros_like(y))


def test_a_batch_is_halved_as_samples_finish() -> None:
    problem, start = some_harder()
    sizes = []
    compiled = solve(
        problem, start, step=Step(0.1), tol=1e-6, max_steps=2000, compiled=True,
        callback=lambda k, s, now: sizes.append(len(s.x)),
    )  # fmt: skip
    usual = solve(problem, start, step=Step(0.1), tol=1e-6, max_steps=2000)
    assert bool(compiled.converged.all()) and set(sizes) <= {8, 4, 2, 1} and sizes[-1] == 1
    assert usual.steps.tolist() == compiled.steps.tolist()
    assert float((usual.value.x - compiled.value.x).abs().max()) < 1e-12


def test_later_solves_of_a_form_compile_nothing() -> None:
    problem, start = some_harder()

    def graphs_of_a_solve(y: Tensor) -> int:
        before = counters["stats"]["unique_graphs"]
        own = Problem(problem.f, problem.cost, context=(y,))
        solve(own, start, step=Step(0.1), tol=1e-30, max_steps=8, on_failure="ignore", compiled=True)
        return counters["stats"]["unique_graphs"] - before

    torch.compiler.reset()
    counters.clear()
    assert graphs_of_a_solve(torch.rand(8, 2).double()) > 0
    assert graphs_of_a_solve(torch.rand(8, 2).double()) == 0


def test_a_context_with_a_history_and_the_gradient_to_it() -> None:
    problem, start = some_harder()
    target = torch.full((8, 2), 0.3, dtype=torch.float64, requires_grad=True)

    def gradient(compiled: bool) -> Tensor:
        own = Problem(problem.f, problem.cost, context=((2 * target).sin(),))
        solution = solve(own, start, step=Step(0.1), tol=1e-8, max_steps=2000, compiled=compiled)
        return torch.autograd.grad(implicit(solution).x.square().sum(), target)[0]

    assert float((gradient(True) - gradient(False)).abs().max()) < 1e-8 < float(gradient(True).abs().max())


def test_a_hook_that_comes_later_is_seen() -> None:
    cell = torch.nn.Linear(2, 2).double()
    torch.nn.init.eye_(cell.weight)
    y = torch.ones(4, 2, dtype=torch.float64)
    problem = Problem(lambda z, x, y: 0.5 * cell(z).tanh() + x, lambda z, x, y: (z - y).square().sum(1), context=(y,))
    start = problem.start(torch.zeros_like(y), torch.zeros_like(y))
    pair(problem, start, Step(0.1))
    cell.register_forward_hook(lambda module, given, out: 0.1 * out)
    usual, compiled = pair(problem, start, Step(0.1))
    assert float((usual.value.x - compiled.value.x).abs().max()) < 1e-12


def test_what_does_not_fit_is_refused_as_ever() -> None:
    problem, start = some_harder()
    wrong = Problem(problem.f, lambda z, x, y: (z - y).square().sum(), context=problem.context)
    with pytest.raises(ValueError, match="one number a sample"):
        solve(wrong, start, step=Step(0.1), compiled=True)


def test_an_f_that_no_graph_can_hold_is_said_so() -> None:
    def f(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return z.tanh() + x if float(z.detach().sum()) > 0 else 0.5 * z + x

    problem, start = some_harder()
    with pytest.raises(RuntimeError, match=r"z\.detach"):
        solve(Problem(f, problem.cost, context=problem.context), start, step=Step(0.1), compiled=True)
