"""The figures of a training for TensorBoard, beside metrics.jsonl."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from jiio.app.run_folder import UserError, writing


def require_tensorboard() -> None:
    """`UserError` where TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs a package that is not installed: pip install 'jiio[tensorboard]'")


class Scalars:
    """Event files in `folder`; those of steps beyond `done`, which a resumed training does again, are hidden."""

    def __init__(self, folder: Path, *, done: int):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        with writing(folder):
            self.writer = SummaryWriter(str(folder), purge_step=done + 1)

    def write(self, figures: dict[str, float]) -> None:
        """A point of every curve."""
        step = int(figures["step"])
        with writing(self.folder):
            for name, value in figures.items():
                if name != "step":
                    self.writer.add_scalar(name, value, step)
            self.writer.flush()
