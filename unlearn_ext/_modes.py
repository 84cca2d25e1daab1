"""In which mode and precision a model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["PRECISIONS", "evaluating", "freeze_batch_norm", "keeping_modes", "keeping_statistics"]

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


def freeze_batch_norm(model: nn.Module) -> None:
    """Batch normalisation goes to eval mode."""
    for module in _batch_norms(model):
        module.eval()


@contextlib.contextmanager
def keeping_statistics(model: nn.Module) -> Iterator[None]:
    """Passes inside the block move no running statistics of batch normalisation. In train mode a batch is normalised by
    its own, as ever; in eval mode by those that ran before."""
    moving = [module for module in _batch_norms(model) if module.track_running_stats]
    for module in moving:
        module.track_running_stats = False  # of the pass: what the module has tracked stays
    try:
        yield
    finally:
        for module in moving:
            module.track_running_stats = True


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
