"""Is a model robust, or are its gradients useless? Checks for gradient masking (Athalye et al. 2018; Carlini et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jiio.autodiff import pull, variable
from jiio.tasks.attack import Attack, JointAttack, PGDAttack, attack
from jiio.tasks.attack_problem import ImageModel, attack_problem, margin
from jiio.tasks.threat import Threat
from jiio.tree import wide

Logits = Callable[[Tensor], Tensor]
RADII = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
TOLERANCES = (1e-1, 1e-2, 1e-3)
UNROLLED = (3, 10, 30)
SQUARE_STEPS = 300
SIGNIFICANT = 0.01  # of accuracy


@dataclass(frozen=True)
class Audit:
    """Accuracies under attack, each over the same images.

    bad_gradients: share of images whose loss gradient is 0 or not finite.  radius, rate, tolerance, unrolled: accuracy (of
    rate: mean loss) by the value swept.  radius_loss: mean loss by the radius.  transfer: images attacked on another model.
    square: gradient-free search.
    findings: what speaks for masking, in sentences; empty for a healthy model.
    """

    clean: float
    attacked: float
    bad_gradients: float
    radius: dict[str, float]
    radius_loss: dict[str, float]
    rate: dict[str, float]
    tolerance: dict[str, float]
    unrolled: dict[str, float]
    transfer: float
    square: float
    findings: list[str]


def audit(
    model: ImageModel, images: Tensor, labels: Tensor, threat: Threat, *, other: Logits,
    watch: Callable[[str], object] = lambda name: None,
) -> Audit:  # fmt: skip
    """Every check on `images` (batch, channels, height, width) of classes `labels`; `other` gives logits of another model.

    `watch` is told the name of each check before it begins. `ValueError` as `attack_problem`.
    """
    # before the first check, which would meet wrong labels with torch's own error, or take them for wrong answers
    (labels,) = attack_problem(model, images, labels, threat).context

    def strongest(method: JointAttack | PGDAttack, radius: float = 1.0) -> Attack:
        wider = Threat(threat.norm, radius * threat.radius, threat.low, threat.high)
        return attack(model, images, labels, wider, method)

    def robust(found: Attack) -> float:
        return float(found.robust.float().mean())

    watch("gradients")
    clean, bad = accuracy(model, images, labels), bad_gradients(model, images, labels)
    watch("radii")
    by_radius = {f"{r:g}": strongest(JointAttack(), r) for r in RADII}
    radius = {key: robust(value) for key, value in by_radius.items()}
    radius_loss = {key: float(value.loss.mean()) for key, value in by_radius.items()}
    watch("step sizes")
    rate = {f"{r:g}": float(strongest(JointAttack(rate=r, mirror=math.inf)).loss.mean()) for r in RATES}
    watch("tolerances")
    tolerance = {f"{t:g}": robust(strongest(PGDAttack(solve_tol=t))) for t in TOLERANCES}
    watch("unrolled states")
    unrolled = {str(k): transferred(model, unrolled_logits(model, k), images, labels, threat) for k in UNROLLED}
    watch("transfer")
    moved = transferred(model, other, images, labels, threat)
    watch("gradient-free search")
    searched = accuracy(model, square_search(model, images, labels, threat), labels)
    attacked = min(radius["1"], *tolerance.values())
    findings = _findings(attacked, bad, radius, {"transfer from another model": moved, "gradient-free search": searched} | {
        f"the gradient through {k} unrolled steps": value for k, value in unrolled.items()
    })  # fmt: skip
    return Audit(clean, attacked, bad, radius, radius_loss, rate, tolerance, unrolled, moved, searched, findings)


def _findings(attacked: float, bad: float, radius: dict[str, float], others: dict[str, float]) -> list[str]:
    found = []
    if bad > SIGNIFICANT:
        found.append(f"{100 * bad:.1f} % of the images have a zero or non-finite gradient")
    last = f"{RADII[-1]:g}"
    if radius[last] > SIGNIFICANT:
        found.append(f"at {last} times the radius {100 * radius[last]:.1f} % are still classified right: it must be 0")
    found += [
        f"{name} is stronger than the white-box attack: {100 * value:.1f} % against {100 * attacked:.1f} %"
        for name, value in others.items()
        if value < attacked - SIGNIFICANT
    ]
    return found


def accuracy(model: Logits, images: Tensor, labels: Tensor) -> float:
    """Share of images classified as labelled."""
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def bad_gradients(model: Logits, images: Tensor, labels: Tensor) -> float:
    """Share of images whose cross-entropy has a zero or non-finite gradient."""
    size = loss_gradient(model, images, labels).flatten(1).norm(dim=1)
    return float((~size.isfinite() | (size == 0)).float().mean())


def loss_gradient(model: Logits, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of each image's cross-entropy in the image."""
    x = variable(images)
    with torch.enable_grad():
        loss = F.cross_entropy(model(x), labels, reduction="none")
    return pull([loss], [torch.ones_like(loss)], [x])[0]


def unrolled_logits(model: ImageModel, steps: int) -> Logits:
    """Logits after `steps` plain steps of f from 0, differentiable by keeping them all: stopped early, or nearly solved."""
    f, readout = model.cell(), model.readout()

    def logits(x: Tensor) -> Tensor:
        z = model.start(x)
        for _ in range(steps):
            z = f(z, x)
        return readout(z)

    return logits


def transferred(
    model: Logits, source: Logits, images: Tensor, labels: Tensor, threat: Threat, *, steps: int = 20
) -> float:
    """Accuracy of `model` on images attacked by gradient ascent on `source`."""
    constraint, rule = threat.constraint(images), threat.rule(0.25)
    x = images
    for _ in range(steps):
        gradient = loss_gradient(source, x, labels)
        with torch.no_grad():
            x = constraint.project(x + float(rule.rate) * rule.direction(gradient))
    return accuracy(model, x, labels)


def square_search(
    model: Logits, images: Tensor, labels: Tensor, threat: Threat, *, steps: int = SQUARE_STEPS, seed: int = 0
) -> Tensor:
    """Random search without gradients, in the manner of the square attack (Andriushchenko et al. 2020): squares of one
    colour, smaller as the search goes on, kept where the margin rises."""
    constraint, generator = threat.constraint(images), torch.Generator().manual_seed(seed)
    best, highest = images, _margin(model, images, labels)
    height, width = images.shape[2:]
    for k in range(steps):
        side = max(1, round(min(height, width) * 0.5 * (1 - k / steps)))
        corners = torch.stack(
            [torch.randint(0, n - side + 1, (len(images),), generator=generator) for n in (height, width)]
        )
        colour = torch.randint(0, 2, (len(images), images.shape[1]), generator=generator).to(images) * 2 - 1
        rows, columns = (
            torch.arange(n)[None] - corner[:, None] for n, corner in zip((height, width), corners, strict=True)
        )
        inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None]
        size = 2 * threat.radius if threat.norm == "linf" else threat.radius / side
        square = inside[:, None].to(images) * colour[:, :, None, None] * size
        with torch.no_grad():
            x = constraint.project(best + square)
            found = _margin(model, x, labels)
        better = found > highest
        best, highest = torch.where(wide(better, x), x, best), torch.where(better, found, highest)
    return best


def _margin(model: Logits, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return margin(model(images), labels)


def surrogate(images: Tensor, labels: Tensor, *, steps: int = 300, seed: int = 0) -> nn.Module:
    """Another model to transfer attacks from: a small convolutional network trained without attacks."""
    classes, channels = int(labels.max()) + 1, images.shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, classes),
        )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(images), (128,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)
