from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from jiio import Accelerated, Anderson, Picard, fixed_point, load, solve, tree
from jiio.data import load_images
from jiio.models import Generator
from jiio.tasks.generation import reconstruction, reconstruction_step
from jiio.tasks.latent_model import start


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


def proposals(solver: Anderson, points: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """What the solver makes of given s and F(s)."""
    memory, found = (), []
    for k, (s, fs) in enumerate(points):
        proposal, memory = solver.step(memory, k, s, fs)
        found.append(proposal)
    return found


def test_anderson_forgets_what_led_to_a_larger_residual() -> None:
    """From the step at which its residual more than doubled, a sample is mixed as if it began there; its neighbour is not."""
    drawn = torch.Generator().manual_seed(0)
    s, step = (torch.randn(10, 2, 8, generator=drawn, dtype=torch.float64) for _ in range(2))
    length = torch.linspace(1.0, 0.7, 10, dtype=torch.float64).repeat(2, 1).T
    length[4:, 0] *= 3
    step = step / step.norm(dim=2, keepdim=True) * length[:, :, None]
    points = list(zip(s, s + step, strict=True))
    found = proposals(Anderson(3, growth=2.0), points)
    anew = proposals(Anderson(3), points[4:])
    never = proposals(Anderson(3), points)
    for k in range(10):
        assert torch.allclose(found[k][1], never[k][1], rtol=1e-12, atol=0)
        assert torch.allclose(found[k][0], never[k][0] if k < 4 else anew[k - 4][0], rtol=1e-9, atol=1e-12)
    assert torch.equal(found[4][0], points[4][1][0]) and not torch.allclose(found[4][0], never[4][0])


def test_anderson_from_the_first_step_of_a_joint_solve() -> None:
    """Which stalls far from the minimum, on some images, where nothing is ever forgotten."""
    model, images = load("digits-generator"), load_images("digits", "test")[:64]
    assert isinstance(model, Generator)
    problem, first = reconstruction(model, images), start(model, len(images))
    cost = {
        growth: solve(
            problem, first, step=reconstruction_step(model, len(images)), solver=Anderson(6, growth=growth), max_steps=60,
            on_failure="ignore",
        ).merit.mean()
        for growth in (1.0, math.inf)
    }  # fmt: skip
    best = solve(problem, first, step=reconstruction_step(model, len(images)), on_failure="ignore").merit.mean()
    assert float(cost[1.0] / best) < 1.01 < 1.1 < float(cost[math.inf] / best)


def test_accelerated_passes_saddles_that_mixing_ends_at() -> None:
    """Descent on (u^2 - 1)^2 / 4 + v^2 / 2 from beside the ridge between its minima, u = 1 and u = -1."""

    def descent(s: Tensor) -> Tensor:
        u, v = s[:, :1], s[:, 1:]
        return torch.cat((u - 0.1 * (u**3 - u), 0.9 * v), dim=1)

    start = torch.tensor([[1e-3, 1.0], [-1e-3, 1.0], [0.3, 2.0]])
    ends = {
        name: fixed_point(descent, start, solver=solver, tol=1e-4, max_steps=200).value
        for name, solver in {"mixed": Anderson(6), "accelerated": Accelerated(), "plain": Picard()}.items()
    }
    minima = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert float((ends["accelerated"] - minima).abs().max()) < 1e-2
    assert float((ends["plain"] - minima).abs().max()) < 1e-2
    assert float((ends["mixed"] - minima).abs().max()) > 0.5


def test_accelerated_shortens_a_flat_valley() -> None:
    """Curvatures over a factor of a thousand: an eighth of the steps of plain descent, at most."""
    curvature = torch.logspace(-3, 0, 20, dtype=torch.float64)
    start = torch.linspace(-2, 2, 60, dtype=torch.float64).view(3, 20)

    def steps(solver: Picard | Accelerated) -> Tensor:
        solution = fixed_point(lambda s: (1 - curvature) * s + 1, start, solver=solver, tol=1e-6, max_steps=9000)
        assert bool(solution.converged.all())
        return solution.steps

    assert bool((8 * steps(Accelerated()) < steps(Picard())).all())


def test_accelerated_takes_each_sample_on_its_own() -> None:
    curvature = torch.logspace(-2, 0, 12, dtype=torch.float64)
    start = torch.linspace(-2, 5, 60, dtype=torch.float64).view(5, 12)
    b = torch.linspace(0, 1, 60, dtype=torch.float64).view(5, 12)

    def end(rows: slice) -> Tensor:
        F = lambda s: s - 0.5 * curvature * (s - b[rows]) / (1 + (s - b[rows]).square())  # noqa: E731
        return fixed_point(F, start[rows], solver=Accelerated(), tol=1e-7, max_steps=900).value

    together = end(slice(None))
    assert float((together[1:2] - end(slice(1, 2))).abs().max()) < 1e-10
    # along the flattest direction a residual of 1e-7 is 200 times as far
    assert float((together - b).abs().max()) < 1e-4


@pytest.mark.parametrize("options", [{"mixing": Anderson(1)}, {"mixing": Picard()}, {"fast": 1.0}, {"momentum": -0.1}])
def test_accelerated_refuses(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"history of at least 2|must lie in"):
        Accelerated(**options)  # type: ignore[arg-type]
