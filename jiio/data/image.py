"""Image files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


def open_image(path: Path, *, channels: int, content: bytes | None = None) -> Image.Image:
    """The file as a grey (1) or colour (3) picture, upright; `ValueError` naming it when it can't be read or is transparent.

    content: of the file, where it is no file of its own (it is in an archive).
    """
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, got {channels}")
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as picture:
            # a camera notes how it was held and leaves the pixels as they came; viewers turn them
            upright = ImageOps.exif_transpose(picture)
            _refuse_transparency(upright, path)
            return _eight_bits(upright, path).convert("L" if channels == 1 else "RGB")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no image file {str(path)!r}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error


def _refuse_transparency(picture: Image.Image, path: Path) -> None:
    """What lies below transparent pixels is whatever a program left there, often black, and no one has seen it."""
    sixteen_bits = picture.mode.startswith("I")  # one value may be transparent; Pillow makes no alpha channel of it
    if not picture.has_transparency_data or sixteen_bits:
        return
    if np.asarray(picture.convert("RGBA").getchannel("A")).min() < 255:
        raise ValueError(
            f"{path} has transparent pixels, and nothing says what is behind them: save it without transparency, on white say"
        )


def _eight_bits(picture: Image.Image, path: Path) -> Image.Image:
    """Grey values of 16 bits scaled to 8, where Pillow's own conversion makes white of all above 255."""
    # older versions of Pillow call the 16 bits of these formats 32
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(picture, dtype=np.float32) / 257).round().astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"{path} holds numbers of 32 bits, and nothing says which is white: save it with 8 or 16 bits")
    return picture


def to_tensor(picture: Image.Image) -> Tensor:
    """(channels, height, width) in [0, 1]."""
    values = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)
    return values[None] if values.dim() == 2 else values.permute(2, 0, 1).contiguous()


def read_image(path: str | Path, *, channels: int) -> Tensor:
    """An image file as (channels, height, width) in [0, 1]."""
    return to_tensor(open_image(Path(path), channels=channels))


def write_image(image: Tensor, path: str | Path) -> None:
    """Write (channels, height, width) in [0, 1], clipped, by the suffix's format."""
    values = (image.detach().clamp(0, 1) * 255).round().byte().cpu().numpy()
    Image.fromarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0)).save(path)
