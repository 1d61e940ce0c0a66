from __future__ import annotations

import importlib

import pytest
import torch

LIBRARIES: list[torch.library.Library] = []  # torch forgets the operators of a library that is collected


@pytest.fixture(scope="session")
def torchvision() -> None:
    """What deepinv and torchmetrics import. It fails beside a CPU build of torch for want of two operators: they are
    declared here, in the tests alone. (Where it is not installed, neither are these two.)"""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        LIBRARIES.append(library)
