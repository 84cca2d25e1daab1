"""In which mode and precision a model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["PRECISIONS", "evaluating", "keeping_modes"]

# What mixed_precision may be, and the dtype of its autocast.
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block. Modules that were frozen in eval mode before stay so afterwards."""
    with keeping_modes(model):
        model.eval()
        yield


@contextlib.contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """After the block every module is in the mode that it was in."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
