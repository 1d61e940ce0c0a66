from __future__ import annotations

import torch
from torch import Tensor

from jiio import Anderson, fixed_point, tree


def test_anderson_keeps_the_memory_layout_of_the_map() -> None:
    """A channels-last cell gets channels-last iterates back, also after rows were taken out, and the same numbers."""
    start = torch.linspace(0, 1, 4 * 8 * 6 * 6, dtype=torch.float64).view(4, 8, 6, 6)

    def iterates(layout: torch.memory_format) -> list[Tensor]:
        solver, memory, s, found = Anderson(3), (), start, []
        for k in range(6):
            fs = (0.5 * s.cos() + 0.1 * s.flip(2)).contiguous(memory_format=layout)
            s, memory = solver.step(memory, k, s, fs)
            found.append(s)
            if k == 3:
                rows = torch.tensor([0, 2])
                s, memory = tree.select(s, rows), tree.select(memory, rows)
        return found

    last, first = iterates(torch.channels_last), iterates(torch.contiguous_format)
    assert all(s.is_contiguous(memory_format=torch.channels_last) for s in last)
    assert all(float((a - b).abs().max()) < 1e-9 for a, b in zip(last, first, strict=True))


def test_anderson_sees_a_few_slow_coordinates_among_many() -> None:
    """Five of 20 000 decide how long it takes; mixing weights from a sample of the coordinates miss them."""
    slow = torch.arange(1000, 20000, 4000)
    factor = torch.full((20000,), 0.3).index_copy(0, slow, torch.linspace(0.9, 0.97, 5))
    b = torch.linspace(0, 1, 40000).view(2, 20000)
    solution = fixed_point(lambda s: factor * s + b, torch.zeros(2, 20000), tol=1e-5, max_steps=30)
    assert bool(solution.converged.all())
