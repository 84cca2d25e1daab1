"""The trained weights of a run in bfloat16, and back in the float32 in which they are written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..distributed.wrappers import trainable

__all__ = ["cast_trained", "widen_trained"]


def cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the weights that may move. Frozen ones and buffers stay as they were read, for they are written so."""
    for p in trainable(model).values():
        if p.dtype != dtype:
            p.data = p.data.to(dtype)


@contextlib.contextmanager
def widen_trained(model: nn.Module, in_bfloat16: bool) -> Iterator[None]:
    """Trained weights are float32 within, as they are written: for pictures before and after alike.

    Args:
        in_bfloat16: whether they are bfloat16 outside; else nothing is done.
    """
    if not in_bfloat16:
        yield
        return
    cast_trained(model, torch.float32)
    try:
        yield
    finally:
        cast_trained(model, torch.bfloat16)
