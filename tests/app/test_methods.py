"""The contenders of a comparison: what they reach, how they count, and when they stop."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from jiio import LBFGS, Adam, Anderson, Problem, Scalar, Step, newton_step
from jiio.app.compare import compare, reference_cost, resolve
from jiio.app.methods import Handover, Joint, Method, Nested, NestedSteps, TorchDEQ
from jiio.solution import Work
from jiio.tree import Tree
from tests.problems import linear_quadratic

EXACT = linear_quadratic()
JOINT = Joint(Step(0.05))
METHODS: dict[str, tuple[Method, int]] = {
    "joint": (JOINT, 300),
    "joint mixed": (Joint(Step(0.05), Anderson(6)), 30),
    "nested": (Nested(Adam(0.1), warm=True, solve_tol=1e-4), 300),
    "nested steps": (NestedSteps(Step(0.05), solve_tol=1e-4), 300),
    "handover": (Handover(JOINT, LBFGS(), after=5, solve_tol=1e-4), 40),
    "torchdeq": (TorchDEQ(Adam(0.1), solve_tol=1e-4), 200),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_contender_reaches_the_closed_form_and_shows_every_step(name: str) -> None:
    if name == "torchdeq":
        pytest.importorskip("torchdeq")
    method, steps = METHODS[name]
    seen: dict[int, Tensor] = {}

    def watch(k: int, x: Tensor, work: Work | None) -> None:
        assert (work is not None) == method.in_rounds
        seen[k] = x.clone()

    work = method.run(EXACT.problem(), EXACT.start(), steps, watch)
    assert sorted(seen) == list(range(steps + 1))
    assert float((seen[steps] - EXACT.solution().x).abs().max()) < 0.02
    assert min(work.f, work.vjp, work.cost_grad) >= steps


def test_a_handover_is_its_joint_steps_and_then_a_nested_method_from_there() -> None:
    problem, start = EXACT.problem(), EXACT.start()
    handover = Handover(JOINT, LBFGS(), after=5)
    assert handover.run(problem, start, 4, None) == JOINT.run(problem, start, 4, None)
    first, state = JOINT.states(problem, start, 5, None)
    first.include(Nested(LBFGS(), warm=True, solve_tol=3e-2).run(problem, state, 7, None))
    assert handover.run(problem, start, 12, None) == first


def test_every_method_is_timed_to_each_target_or_said_not_to_reach_it() -> None:
    problem, start = EXACT.problem(), EXACT.start()
    best = reference_cost(problem, [start], [JOINT], steps=300)
    assert best == pytest.approx(float(problem.cost(EXACT.solution().z, EXACT.solution().x, EXACT.y).mean()), rel=1e-4)
    methods: dict[str, Method] = {"joint": JOINT, "handover": METHODS["handover"][0], "slow": Joint(Step(1e-5))}
    targets = {"far": 1.5 * best, "near": 1.05 * best}
    rows, _ = compare(methods, problem, start, targets=targets, budgets=dict.fromkeys(methods, 60), repeats=2)
    found = {(row.method, row.target): row for row in rows}
    assert len(found) == 6
    for name in ("joint", "handover"):
        far, near = (found[name, target] for target in targets.values())
        assert far.steps is not None and near.steps is not None and far.steps <= near.steps
        assert far.repeats == near.repeats == 2 and near.fastest is not None and near.slowest is not None
        assert near.seconds is not None and near.fastest <= near.seconds <= near.slowest
        assert far.work is not None and near.work is not None and far.work <= near.work
    assert found["slow", targets["near"]].steps is None and found["slow", targets["near"]].repeats == 0


def test_what_can_not_be_solved_again_has_reached_no_target() -> None:
    """An f that has no equilibrium: where z ends is of no meaning, nor is its cost."""
    problem = Problem(lambda z, x: z + 1 + 0 * x, lambda z, x: 1 / z.square().sum(1) + x.square().sum(1))
    start = problem.start(torch.ones(2, 1), torch.ones(2, 1))
    assert resolve(problem, start.z, start.x)[1].tolist() == [float("inf")] * 2
    best = reference_cost(problem, [start], [JOINT], steps=5)
    rows, _ = compare({"joint": JOINT}, problem, start, targets={"near": best}, budgets={"joint": 5}, repeats=1)
    assert [(row.steps, row.resolved) for row in rows] == [(None, False)]


def test_nested_steps_take_z_along_and_keep_their_rule_up_to_date() -> None:
    """With the exact tangent of a linear map each solve after the first finds z where it belongs."""
    problem, start = EXACT.problem(), EXACT.start()
    step = newton_step(problem, start)
    assert step.tangent is not None
    carried = NestedSteps(step, 1e-2).run(problem, start, 10, None)
    left = NestedSteps(Step(step.rule), 1e-2).run(problem, start, 10, None)
    assert carried.f < left.f
    met: list[int] = []

    @dataclass(frozen=True)
    class Noting(Scalar):
        def refresh(self, z: Tree, x: Tensor, k: int, lag: Tensor) -> Noting:
            met.append(k)
            return self

    NestedSteps(Step(Noting(0.05))).run(problem, start, 3, None)
    assert met == [0, 1, 2, 3]
