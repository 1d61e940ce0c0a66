"""What `jiio audit` prints."""

from __future__ import annotations

from jiio.app.table import console, show
from jiio.tasks.masking import Audit


def show_audit(found: Audit) -> None:
    """A line a check, then the verdict."""

    def swept(values: dict[str, float]) -> str:
        return "  ".join(f"{key}: {100 * value:.1f}" for key, value in values.items())

    def losses(values: dict[str, float]) -> str:
        return "  ".join(f"{key}: {value:.3f}" for key, value in values.items())

    lines = [
        ["zero or non-finite gradients", f"{100 * found.bad_gradients:.1f}"],
        ["clean", f"{100 * found.clean:.1f}"],
        ["under attack, by the share of the radius", swept(found.radius)],
        ["by the tolerance of cold solves (PGD)", swept(found.tolerance)],
        ["by the number of unrolled steps", swept(found.unrolled)],
        ["attacked on another model", f"{100 * found.transfer:.1f}"],
        ["gradient-free search", f"{100 * found.square:.1f}"],
        ["mean loss by the share of the radius", losses(found.radius_loss)],
        ["mean loss by the step in radii", losses(found.rate)],
    ]
    show("Gradient masking", ("check", "accuracy %"), lines)
    for finding in found.findings:
        console.print(f"[yellow]{finding}[/]")
    if not found.findings:
        console.print("nothing speaks for gradient masking")
