"""Class labels that a user gives, checked once before a solve: within one, a wrong label is a quiet loss of 0 or torch's
own error."""

from __future__ import annotations

import torch
from torch import Tensor


def check_labels(name: str, labels: object, images: Tensor, classes: int) -> Tensor:
    """`labels` (batch,) as int64; `ValueError`, called `name` there, unless they are integers from 0 to `classes` - 1, one an
    image.

    >>> check_labels("labels", torch.tensor([2, 0], dtype=torch.int32), torch.zeros(2, 1, 4, 4), classes=3)
    tensor([2, 0])
    """
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"{name} must be an integer tensor of shape ({len(images)},), one entry an image; got {type(labels).__name__}"
        )
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{name} must be integers, got {labels.dtype}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{name} of shape {tuple(labels.shape)} do not fit images of shape {tuple(images.shape)}")
    if len(labels):
        least, most = torch.stack(labels.aminmax()).tolist()  # one transfer from the device
        if least < 0 or most >= classes:
            raise ValueError(f"{name} of {classes} classes lie between 0 and {classes - 1}, got {least} to {most}")
    return labels.long()
