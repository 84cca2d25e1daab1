"""The factor by which a gradient is clipped to a norm."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

__all__ = ["as_scalar", "clip_factor"]


@overload
def clip_factor(limit: float | None, square: float) -> float: ...
@overload
def clip_factor(limit: float | None, square: Tensor) -> float | Tensor: ...
def clip_factor(limit: float | None, square: float | Tensor) -> float | Tensor:
    """min(1, limit / (norm + 1e-6)), as torch's clip_grad_norm_; ``square`` is the norm's."""
    if limit is None:
        return 1.0
    factor = limit / (square**0.5 + 1e-6)
    return factor.clamp(max=1.0) if isinstance(factor, Tensor) else min(factor, 1.0)


def as_scalar(value: float | Tensor) -> Tensor:
    """A 0-d float64 tensor, where the value is; on the CPU for a number, whatever torch's default device."""
    if isinstance(value, Tensor):
        return value.to(torch.float64)
    return torch.tensor(value, dtype=torch.float64, device="cpu")
