"""`jiio attack`: attacked copies of image files and a picture of what was changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jiio.app.figure import image_grid
from jiio.app.run_folder import UserError
from jiio.app.table import console
from jiio.data import write_image
from jiio.models import Classifier
from jiio.tasks.attack import RIVALS, JointAttack, attack
from jiio.tasks.threat import Threat

SHOWN = 10  # images in the picture
PICTURE = "attack.png"  # beside the attacked files


def attack_and_write(
    model: Classifier, paths: Sequence[Path], images: Tensor, threat: Threat, targets: Sequence[Path], *,
    target: int | None, restarts: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Attack `images` away from the model's own answers, or towards `target`; write each to its place in `targets`.

    Images that the model takes for the target as they are are named and left out; `UserError` where that is all of them.
    Distances and predictions are those of the files, whose 8 bits may put them a little outside the ball.
    """
    with torch.no_grad():
        answers = model(images).argmax(1)
    rows = _off_target(paths, answers, target)
    images, answers, targets = images[rows], answers[rows], [targets[row] for row in rows]
    goal = None if target is None else torch.full_like(answers, target)
    # the largest margin is a wrong answer wherever one was found, the largest cross-entropy need not be
    rivals = RIVALS if target is None else 0
    method = JointAttack(steps=60, restarts=restarts, loss="margin", mirror=math.inf, rivals=rivals, seed=seed)
    found = attack(model, images, answers, threat, method, target=goal)
    stored = (found.images * 255).round() / 255  # files have 8 bits
    offset = (stored - images).flatten(1)
    sizes = offset.norm(dim=1) if threat.norm == "l2" else offset.abs().amax(1)
    with torch.no_grad():
        predictions = model(stored).argmax(1)
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    for file, image, before, after, size in zip(
        targets, stored, answers.tolist(), predictions.tolist(), sizes.tolist(), strict=True
    ):
        write_image(image, file)
        console.print(f"{file}: {outcome(before, after, target, threat)}; {threat.norm} distance {size:.2f}")
    place = targets[0].parent / PICTURE
    picture = _picture(images.cpu(), stored.cpu(), answers.tolist(), predictions.tolist(), place)
    console.print(f"side by side: {picture}")
    return {
        "files": [str(file) for file in targets],
        "picture": str(picture),
        "before": answers.tolist(),
        "after": predictions.tolist(),
        "distance": sizes.tolist(),
        "resolved": found.resolved.tolist(),
    }


def _off_target(paths: Sequence[Path], answers: Tensor, target: int | None) -> list[int]:
    """Which of the files the model does not take for `target` already; says which it does."""
    rows = [row for row, answer in enumerate(answers.tolist()) if answer != target]
    if not rows:
        raise UserError(f"the model takes every image for {target} as it is: give another --target, or none")
    for path, answer in zip(paths, answers.tolist(), strict=True):
        if answer == target:
            console.print(f"{path}: already {target}, not attacked")
    return rows


def outcome(before: int, after: int, target: int | None, threat: Threat) -> str:
    """What became of the answer, and what to try where it is not what was asked for."""
    if after == target or (target is None and after != before):
        return f"[bold]{before} -> {after}[/]"
    reached = f"still {before}" if after == before else f"{before} -> {after}, not {target},"
    return f"{reached} within {threat.norm} radius {threat.radius:g} (try a larger --radius)"


def _picture(images: Tensor, attacked: Tensor, before: list[int], after: list[int], path: Path) -> Path:
    images, attacked = images[:SHOWN], attacked[:SHOWN]
    change = attacked - images
    # grey is no change; the largest one of each image is black or white
    scale = change.flatten(1).abs().amax(1).clamp_min(1e-12).view(-1, 1, 1, 1)
    rows = [
        ("original", images, [str(answer) for answer in before[:SHOWN]]),
        ("change", 0.5 + 0.5 * change / scale, None),
        ("attacked", attacked, [str(answer) for answer in after[:SHOWN]]),
    ]
    return image_grid(rows, path)
