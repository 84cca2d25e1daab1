"""Pictures in [-1, 1] and as bytes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["to_bytes"]


def to_bytes(pictures: Tensor) -> Tensor:
    """uint8 of pictures in [-1, 1], clamped and rounded to nearest. A NaN would come out black: look for it before."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
