"""Measurement operators of deepinv (`pip install jiio[inverse]`) as operators of this library.

deepinv itself is not imported: any object with `A` and `A_adjoint` on batches of images will do.

    operator, sigma = from_physics(physics, image_shape)
    measurement = measure(operator, images, sigma=sigma)                   # damaged here
    measurement = measured_by(physics, y, image_shape)                     # or measured elsewhere
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from jiio.tasks.measurement import Identity, Mask, Measurement, Operator, Parameters, Shape

PROBES = 3  # random images that show whether an operator only hides pixels, is linear, and has the adjoint it says


class LinearPhysics(Protocol):
    """What is needed of a physics object; `deepinv.physics.LinearPhysics` has it."""

    def A(self, x: Tensor) -> Tensor:
        """A x."""
        ...

    def A_adjoint(self, y: Tensor) -> Tensor:
        """A^T y."""
        ...

    def buffers(self) -> Iterator[Tensor]:
        """Its tensors, which say on what device it works."""
        ...


@dataclass(frozen=True)
class PhysicsOperator:
    """A linear physics object, the same for every sample."""

    physics: LinearPhysics = field(repr=False)

    def draw(self, shape: Shape, generator: torch.Generator) -> Parameters:
        """Nothing to draw."""
        return ()

    def apply(self, image: Tensor, *parameters: Tensor) -> Tensor:
        """A image."""
        return self.physics.A(image)

    def adjoint(self, y: Tensor, *parameters: Tensor) -> Tensor:
        """A^T y."""
        return self.physics.A_adjoint(y)


def from_physics(physics: LinearPhysics, image_shape: Shape) -> tuple[Operator, float]:
    """(operator, sigma of its noise) of a linear physics object for images of `image_shape` (channels, height, width).

    One that only hides pixels becomes a `Mask` and one that does nothing the `Identity`: restoration treats hidden pixels
    in their own way. Noise is read from `noise_model`: none, or Gaussian of one sigma on [0, 1]. Raises `ValueError` for
    another noise, for an operator that is not linear, has another adjoint, complex values or parameters for each sample.
    """
    buffer = next((part for part in physics.buffers() if part.is_floating_point()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(PROBES, *image_shape, generator=generator).to(buffer)
    with torch.no_grad():
        seen = _measured(physics, probes)
        _check(physics, probes, seen)
        ones = physics.A(torch.ones_like(probes))[0]
    sigma = _sigma(physics)
    if seen.shape == probes.shape and torch.equal(seen, ones * probes) and bool(((ones == 0) | (ones == 1)).all()):
        if bool(ones.all()):
            return Identity(), sigma
        return Mask(ones[:1] if bool((ones == ones[:1]).all()) else ones), sigma
    return PhysicsOperator(physics), sigma


def measured_by(physics: LinearPhysics, y: Tensor, image_shape: Shape) -> Measurement:
    """The measurement `y` = physics(images), (batch, ...), as `restore` takes it."""
    operator, sigma = from_physics(physics, image_shape)
    drawn = operator.draw(image_shape, torch.Generator())
    parameters = tuple(part.to(y).expand(len(y), *part.shape) for part in drawn)
    return Measurement(operator, y, parameters, sigma, image_shape)


def _measured(physics: LinearPhysics, probes: Tensor) -> Tensor:
    try:
        return physics.A(probes)
    except RuntimeError as error:  # torch's, of shapes that do not fit
        shape = tuple(probes.shape[1:])
        raise ValueError(f"{type(physics).__name__} does not measure images of shape {shape}: {error}") from error


def _check(physics: LinearPhysics, probes: Tensor, seen: Tensor) -> None:
    name = type(physics).__name__
    if len(seen) != PROBES or seen.is_complex():
        raise ValueError(f"{name} must give a real measurement for each of {PROBES} images, got {tuple(seen.shape)}")
    if not torch.allclose(physics.A(probes.flip(0)), seen.flip(0), rtol=1e-4, atol=1e-5):
        raise ValueError(f"{name} measures every sample in its own way: make one physics for all samples")
    if not torch.allclose(physics.A(probes[:1] - 2 * probes[1:2]), seen[:1] - 2 * seen[1:2], rtol=1e-3, atol=1e-4):
        raise ValueError(f"{name} is not linear")
    back = physics.A_adjoint(seen)
    square, product = seen.double().square().sum(), (back.double() * probes.double()).sum()
    if not torch.isclose(square, product, rtol=1e-3):
        raise ValueError(
            f"A_adjoint of {name} is not the adjoint of A: |A x|^2 = {square:.4g}, <x, A^T A x> = {product:.4g}"
        )


def _sigma(physics: Any) -> float:
    """The standard deviation of a physics object's noise, known by its class's name, for deepinv is not imported."""
    noise = getattr(physics, "noise_model", None)
    kind = type(noise).__name__
    if noise is None or kind == "ZeroNoise":
        return 0.0
    if kind != "GaussianNoise":
        raise ValueError(f"the noise must be Gaussian, got {kind}: give the measurement and its sigma to Measurement")
    sigma = torch.as_tensor(noise.sigma)
    if sigma.numel() != 1:
        raise ValueError("the noise must have one sigma for all samples")
    return float(sigma)
