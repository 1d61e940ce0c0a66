"""The well-posed cell: its two gains hold whatever the parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jiio.models import Activation, LatentInjection, WellPosedCell
from jiio.models.activation import Name

SHAPES = ((4, 8, 8), (6, 4, 4), (5, 2, 2))
LATENT = 5


def build(
    seed: int = 0, *, contraction: float = 0.9, activation: Name = "silu", driven: tuple[int, ...] | None = None
) -> WellPosedCell:
    torch.manual_seed(seed)
    injection = LatentInjection(LATENT, SHAPES, unit_gain=2.0, driven=driven)
    channels = tuple(shape[0] for shape in SHAPES)
    return WellPosedCell(
        injection, channels=channels, contraction=contraction, activation=Activation(activation)
    ).double()


def split(flat: Tensor) -> tuple[Tensor, ...]:
    """(batch, n) -> maps of SHAPES."""
    parts = flat.split([c * h * w for c, h, w in SHAPES], dim=1)
    return tuple(part.view(-1, *shape) for part, shape in zip(parts, SHAPES, strict=True))


def join(maps: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.flatten(1) for part in maps], dim=1)


ENTRIES = sum(c * h * w for c, h, w in SHAPES)


def draw(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operator_norm(model: WellPosedCell) -> float:
    """The norm of contraction * W from its dense matrix: all that f does to z before the activation."""
    with torch.no_grad():
        basis = split(torch.eye(ENTRIES, dtype=torch.float64))
        matrix = join(tuple(model._mix(model.operator(), basis)))
    return float(torch.linalg.matrix_norm(matrix, ord=2)) * model.activation.lipschitz


def jacobians(model: WellPosedCell, seed: int) -> tuple[Tensor, Tensor]:
    """Dense df/dz and df/dx at a random point."""
    f, z, x = model.cell(), draw(1, ENTRIES, seed), draw(1, LATENT, seed + 1)

    def flat(z: Tensor, x: Tensor) -> Tensor:
        return join(f(split(z), x))[0]

    jacobian = torch.autograd.functional.jacobian(flat, (3 * z, x), vectorize=True)
    return jacobian[0][:, 0], jacobian[1][:, 0]


def drift(model: WellPosedCell, steps: int = 60) -> None:
    """Large optimiser steps that drive both gains up as far as they will go."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    z, dz = split(draw(4, ENTRIES)), draw(4, ENTRIES, 2)
    x, dx = draw(4, LATENT), draw(4, LATENT, 3)
    for _ in range(steps):
        f = model.cell()
        here = join(f(z, x))
        gain = join(f(split(join(z) + dz), x)) - here, join(f(z, x + dx)) - here
        loss = -(gain[0].norm() + gain[1].norm() + here.square().mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("contraction", [0.5, 0.95])
def test_operator_norm_is_at_most_the_contraction_and_not_far_below(contraction: float) -> None:
    norm = operator_norm(build(contraction=contraction))
    # adding block norms is conservative for random blocks, and so is the bound on the infinite plane for small maps
    assert 0.25 * contraction < norm <= contraction


def test_both_gains_hold_after_adversarial_optimiser_steps() -> None:
    model = build()
    drift(model)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert operator_norm(model) <= model.contraction
    for seed in (5, 6):
        to_z, to_x = jacobians(model, seed)
        assert torch.linalg.matrix_norm(to_z, ord=2) <= model.contraction
        assert torch.linalg.matrix_norm(to_x, ord=2) <= model.injection.gain * (1 + 1e-12)


@pytest.mark.parametrize("name", ["silu", "softplus", "tanh", "relu"])
def test_jacobians_are_bounded_for_every_activation(name: Name) -> None:
    model = build(activation=name)
    to_z, to_x = jacobians(model, 3)
    assert torch.linalg.matrix_norm(to_z, ord=2) <= model.contraction
    assert torch.linalg.matrix_norm(to_x, ord=2) <= model.injection.gain


@pytest.mark.parametrize("name", ["silu", "softplus", "tanh", "relu"])
def test_lipschitz_constant_of_an_activation_is_an_upper_bound_and_tight(name: Name) -> None:
    activation = Activation(name)
    t = torch.linspace(-30, 30, 100_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(activation(t).sum(), t)
    assert 0.999 * activation.lipschitz < slope.abs().max() <= activation.lipschitz


def test_random_starts_reach_one_equilibrium() -> None:
    model, x = build(), draw(1, LATENT).expand(6, -1)
    f, z = model.cell(), split(10 * draw(6, ENTRIES))
    with torch.no_grad():
        for _ in range(300):
            z = f(z, x)
    assert torch.allclose(join(z), join(z)[:1].expand(6, -1), atol=1e-12)


def test_every_direction_of_x_has_the_same_gain_into_the_driven_scales() -> None:
    for driven in (None, (1,)):
        u = build(driven=driven).injection
        moved = join(u.bind()(torch.eye(LATENT, dtype=torch.float64))) - join(
            u.bind()(torch.zeros(1, LATENT, dtype=torch.float64))
        )
        gain = torch.full((LATENT,), u.gain, dtype=torch.float64)
        assert torch.allclose(torch.linalg.svdvals(moved), gain)


def test_zero_latent_is_not_a_dead_point() -> None:
    model = build(activation="relu")
    f, x = model.cell(), torch.zeros(1, LATENT, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(join(f(model.start(x), x)).sum(), x)
    assert gradient.norm() > 0


def test_train_and_eval_give_the_same_f_and_there_is_no_batch_norm() -> None:
    model = build()
    z, x = split(draw(2, ENTRIES)), draw(2, LATENT)
    train = join(model.train().cell()(z, x))
    assert torch.equal(train, join(model.eval().cell()(z, x)))
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())


def test_a_bound_cell_ignores_later_changes_of_the_parameters() -> None:
    model = build()
    z, x = split(draw(2, ENTRIES)), draw(2, LATENT)
    with torch.no_grad():
        f = model.cell()
        before = join(f(z, x))
        for weight in model.weights:
            weight.add_(1.0)
        assert torch.equal(before, join(f(z, x)))


def test_gradients_reach_every_parameter_and_none_is_recorded_without_grad() -> None:
    model = build()
    z, x = split(draw(2, ENTRIES)), draw(2, LATENT)
    join(model.cell()(z, x)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in model.parameters())
    with torch.no_grad():
        f = model.cell()
    assert not join(f(z, x)).requires_grad


def test_wrong_options_are_refused() -> None:
    injection = LatentInjection(LATENT, SHAPES)
    with pytest.raises(ValueError, match=r"contraction must lie in \(0, 1\), got 1.0"):
        WellPosedCell(injection, channels=(4, 6, 5), contraction=1.0)
    with pytest.raises(ValueError, match="channels"):
        WellPosedCell(injection, channels=())
    with pytest.raises(ValueError, match=r"channels \(4, 6\) are not those of the injection's shapes \(\(4, 8, 8\)"):
        WellPosedCell(injection, channels=(4, 6))
    with pytest.raises(ValueError, match=r"channels \(4, 6, 6\) are not those"):
        WellPosedCell(injection, channels=(4, 6, 6))
    with pytest.raises(ValueError, match="unknown activation 'gelu'"):
        Activation("gelu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unit_gain"):
        LatentInjection(LATENT, SHAPES, unit_gain=0.0)
    with pytest.raises(ValueError, match="latent"):
        LatentInjection(10_000, SHAPES)
