"""`torch.compile` of functions that take derivatives, each in one graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch

Inputs = ParamSpec("Inputs")
Output = TypeVar("Output")

BACKEND = "inductor"
SWITCHES = {
    "trace_autograd_ops": True,  # torch 2.13 takes autograd.grad into a graph by this alone
    "skip_nnmodule_hook_guards": False,  # a hook put on a module of f after the first solve would not be seen
    # a number in f, a set or a rule is part of a graph, and so is a batch size: a program has many
    "recompile_limit": 1024,
    "accumulated_recompile_limit": 4096,
}


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
