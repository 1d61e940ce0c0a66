"""`torch.compile` of functions that take derivatives, each in one graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch

Inputs = ParamSpec("Inputs")
Output = TypeVar("Output")

BACKEND = "inductor"
# torch 2.13 takes autograd.grad into a graph by the first alone; problems of many kinds in one program are as many graphs.
SWITCHES = {"trace_autograd_ops": True, "recompile_limit": 64}


def run_as(function: Callable[Inputs, Output], compiled: bool) -> Callable[Inputs, Output]:
    """`function`, or where `compiled` the same as one graph of torch.compile."""
    return _compiled(function, BACKEND) if compiled else function


@cache
def _compiled(function: Callable[Inputs, Output], backend: str) -> Callable[Inputs, Output]:
    run = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
    switches = {name: value for name, value in SWITCHES.items() if hasattr(torch._dynamo.config, name)}

    def call(*args: Inputs.args, **options: Inputs.kwargs) -> Output:
        with torch._dynamo.config.patch(switches):
            return run(*args, **options)

    return call
