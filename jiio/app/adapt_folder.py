"""`jiio adapt RUN FOLDER`: learn classes from a user's own few images and label others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jiio.app.figure import image_grid
from jiio.app.restore import read_images
from jiio.app.run_folder import UserError, user_input
from jiio.app.table import console
from jiio.models import ContextClassifier
from jiio.tasks.meta import Query, adapt

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SHOWN = 10  # images of a row


def adapt_folder(model: ContextClassifier, folder: Path, picture: Path, *, device: str, prior: float) -> dict[str, Any]:
    """Sub-folders of `folder` are classes, the images in them their examples; images beside them are labelled."""
    names, support, labels, files, images = read_folder(folder, model.config.image_shape)
    solution = adapt(
        model, support[None].to(device), labels[None].to(device), len(names), prior=prior, on_failure="ignore"
    )
    with torch.no_grad():
        logits = Query(model)(solution.value, labels[None].to(device), images[None].to(device), len(names))[0].cpu()
    share = torch.softmax(logits, dim=1).max(dim=1)
    answers = [names[i] for i in share.indices.tolist()]
    for file, answer, certain in zip(files, answers, share.values.tolist(), strict=True):
        console.print(f"{file}: [bold]{answer}[/] ({100 * certain:.0f} %)")
    converged = bool(solution.converged.all())
    if not converged:
        console.print("[yellow]the adaptation did not converge: take the answers with care[/]")
    rows: list[tuple[str, Tensor, list[str] | None]] = [
        (name, support[labels == i][:SHOWN], None) for i, name in enumerate(names)
    ]
    rows += [("to label", images[i : i + SHOWN], answers[i : i + SHOWN]) for i in range(0, len(images), SHOWN)]
    console.print(f"picture: {image_grid(rows, picture)}")
    return {
        "labels": {str(file): answer for file, answer in zip(files, answers, strict=True)},
        "share": share.values.tolist(),
        "converged": converged,
        "picture": str(picture),
    }


def read_folder(folder: Path, shape: tuple[int, int, int]) -> tuple[list[str], Tensor, Tensor, list[Path], Tensor]:
    """(class names, support, labels, files to label, their images), ink 1 on 0; `UserError` for what can't be used."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    classes = {path.name: pictures(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    classes = {name: files for name, files in classes.items() if files}
    if len(classes) < 2:
        raise UserError(
            f"{folder} has {len(classes)} sub-folders with images: at least 2 classes, a sub-folder each, are needed"
        )
    files = pictures(folder)
    if not files:
        raise UserError(f"{folder} itself has no images to label beside its sub-folders of examples")
    support = [_ink(file, shape) for part in classes.values() for file in part]
    labels = [i for i, part in enumerate(classes.values()) for _ in part]
    images = torch.stack([_ink(file, shape) for file in files])
    return list(classes), torch.stack(support), torch.tensor(labels), files, images


def pictures(folder: Path) -> list[Path]:
    """The image files of a folder, sorted."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in SUFFIXES)


def _ink(file: Path, shape: tuple[int, int, int]) -> Tensor:
    with user_input():
        image = read_images((file,), shape)[0]
    return 1 - image if float(image.mean()) > 0.5 else image  # dark on light: the model knows ink as 1
