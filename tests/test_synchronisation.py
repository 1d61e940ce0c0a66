"""A step reads no tensor's value: a GPU is waited for at looks alone, one of every few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from jiio import (
    Accelerated,
    Anderson,
    Box,
    Broyden,
    Constraint,
    Delayed,
    Free,
    L2Ball,
    LinfBall,
    Normalized,
    Picard,
    Scalar,
    Simplex,
    Step,
    Work,
)
from jiio.fixed_point import CHECK_EVERY
from jiio.input_memory import InputMemory
from jiio.joint import JointMap
from jiio.solver import Solver
from tests.problems import linear_quadratic

READING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class Reads(TorchDispatchMode):
    """Counts the operations whose result's shape or value Python has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = func.overloadpacket._qualified_op_name == "aten::index" and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
        )
        self.count += masked or func.overloadpacket._qualified_op_name.removeprefix("aten::") in READING
        return func(*args, **(kwargs or {}))


def reads(constraint: Constraint, solver: Solver, step: Step) -> int:
    """Of thirty steps as a solve takes them, every third of them measured."""
    exact = linear_quadratic()
    s = exact.start()._replace(x=exact.start().x + 0.3)
    memory = InputMemory.fresh(step.rule, s.x)
    F = JointMap(
        exact.problem(constraint=constraint), step, s.x.new_ones(len(s.x)), Work(), 1e-3, memory, solver.plain_steps
    )
    kept = solver.init(s)
    with Reads() as counted:
        for k in range(30):
            fs = F.advance(s, k) if k % CHECK_EVERY else F.evaluate(s, k).next
            s, kept = solver.step(kept, k, s, fs)
            s = F.project(s)
    return counted.count


SETS: dict[str, Callable[[], tuple[Constraint, Step]]] = {
    "free": lambda: (Free(), Step(0.01)),
    "box": lambda: (Box(0.0, 1.0), Step(0.01)),
    "L2 ball": lambda: (L2Ball(torch.zeros(1, 3).double(), 1.0), Step(Normalized(0.01))),
    "maximum norm": lambda: (LinfBall(torch.zeros(1, 3).double(), 1.0), Step(Scalar(0.01))),
    "simplex": lambda: (Simplex(), Step(0.01)),
}


@pytest.mark.parametrize("kind", SETS)
def test_a_step_reads_nothing(kind: str) -> None:
    constraint, step = SETS[kind]()
    assert reads(constraint, Picard(), step) == 0


@pytest.mark.parametrize("solver", [Anderson(5), Delayed(Anderson(5), after=4), Accelerated(), Broyden(5)])
def test_no_solver_reads_either(solver: Solver) -> None:
    assert reads(Free(), solver, Step(0.01)) == 0


def test_a_reading_solver_would_be_seen() -> None:
    class Curious(Picard):
        def step(self, memory: Any, k: int, s: Any, fs: Any) -> tuple[Any, Any]:
            assert float(fs.x.sum()) < 1e9
            return super().step(memory, k, s, fs)

    assert reads(Free(), Curious(), Step(0.01)) == 30
