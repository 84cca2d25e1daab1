"""In which mode and precision a model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..errors import InputError
from .wrappers import unwrapped

__all__ = ["PRECISIONS", "evaluating", "freeze_batch_norm", "has_batch_norm", "keeping_modes", "keeping_statistics"]
__all__ += ["measuring", "put_modes", "set_training", "without_float16"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# What mixed_precision may be, and the dtype of its autocast.
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block. Modules that were frozen in eval mode before stay so afterwards."""
    with keeping_modes(model):
        try:
            model.eval()
        except NotImplementedError as error:  # torch.export's
            raise InputError(
                f"the model, or a part of it, has no eval mode ({error}): pass the one that it was exported from"
            ) from None
        yield


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, in which layers with loralib's ``merge_weights`` do not merge their adapters: merged
    ones get no gradient."""
    merging = [module for module in model.modules() if getattr(module, "merge_weights", None) is True]
    with keeping_modes(model):
        for module in merging:
            module.train()
            module.merge_weights = False
        try:
            with evaluating(model):
                yield
        finally:
            for module in merging:
                module.merge_weights = True


def without_float16(kind: str) -> contextlib.AbstractContextManager:
    """Turns autocast off on devices of a kind where it is in float16, in which gradients that no loss scale enlarges
    underflow: 0 / 0 would open a mask."""
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return torch.autocast(kind, enabled=False) if half else contextlib.nullcontext()


@contextlib.contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """After the block every module is in the mode that it was in."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        put_modes(before)


def put_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Puts modules, in the order of ``model.modules()``, into the modes given. A class with a ``train`` of its own may
    do more there than set the flag, such as merge adapters into weights in eval mode, and take them out again."""
    modes = list(modes)
    for module, training in modes:
        if module.training != training and type(module).train is not nn.Module.train:
            module.train(training)
    for module, training in modes:
        module.training = training


def set_training(model: nn.Module, freeze_norms: bool) -> None:
    """The modes of a run's steps: a model in eval mode is switched as a whole; in one in train mode, modules that are
    in eval mode are frozen on purpose, and stay so."""
    if not unwrapped(model).training:
        model.train()
    if freeze_norms:
        freeze_batch_norm(model)


def freeze_batch_norm(model: nn.Module) -> None:
    """Batch normalisation goes to eval mode."""
    for module in _batch_norms(model):
        module.eval()


def has_batch_norm(model: nn.Module) -> bool:
    """Whether there is batch normalisation that takes a batch's own statistics now."""
    return any(module.training for module in _batch_norms(model))


@contextlib.contextmanager
def keeping_statistics(model: nn.Module) -> Iterator[None]:
    """Passes inside the block move no running statistics of batch normalisation; batches are normalised as ever.

    Raises:
        InputError: a scripted or traced module, whose code no longer asks.
    """
    norms = [module for module in _batch_norms(model) if module.training]
    if any(isinstance(module, torch.jit.ScriptModule) for module in norms):
        raise InputError(
            "batch_norm_statistics='retain' does not reach batch normalisation in a scripted or traced model: pass the "
            "model it was made from"
        )
    moving = [module for module in norms if module.track_running_stats]
    for module in moving:
        module.track_running_stats = False  # in train mode torch then hands on no running statistics; the buffers stay
    try:
        yield
    finally:
        for module in moving:
            module.track_running_stats = True


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    """Scripted ones too, which have lost their class."""
    kinds = {kind.__name__ for kind in _NORMS}
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, "original_name", None) in kinds
    ]
