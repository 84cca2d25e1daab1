"""Modes of the process that are the caller's and not the run's: gradients, autocast, inference mode."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

from ..errors import InputError
from .arguments import describe

__all__ = ["in_run_modes", "recording", "run_modes"]

P = ParamSpec("P")
T = TypeVar("T")
_CALLBACKS = ("evaluate", "progress")


def _devices() -> list[str]:
    """Types of devices for which autocast may be on."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


@contextlib.contextmanager
def _autocast(settings: dict[str, tuple[bool, torch.dtype]]) -> Iterator[None]:
    """Half copies of weights live until the outermost autocast ends, where steps would move the weights below them."""
    torch.clear_autocast_cache()
    try:
        with contextlib.ExitStack() as stack:
            for kind, (enabled, dtype) in settings.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield
    finally:
        torch.clear_autocast_cache()


@contextlib.contextmanager
def run_modes() -> Iterator[None]:
    """Gradients are on, and autocast and inference mode off, whatever is set around the block."""
    off = {kind: (False, torch.get_autocast_dtype(kind)) for kind in _devices()}
    with recording(), _autocast(off):
        yield


def in_run_modes(run: Callable[P, T]) -> Callable[P, T]:
    """Decorates a method that is to be called in :func:`run_modes`. Its callbacks are called in the modes of the
    caller; only inference mode becomes no_grad, so that a model which keeps tensors of its passes can go on training.
    """

    @functools.wraps(run)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        gradients = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        casts = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _devices()}

        for name in _CALLBACKS:
            if not (kwargs.get(name) is None or callable(kwargs[name])):
                raise InputError(f"{name}: expected a function, got {describe(kwargs[name])}")

        def in_callers_modes(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                with torch.set_grad_enabled(gradients), _autocast(casts):
                    return function(*args, **kwargs)

            return call

        for name in _CALLBACKS:
            if callable(callback := kwargs.get(name)):
                kwargs[name] = in_callers_modes(callback)
        with run_modes():
            return run(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Autograd records inside the block, also within ``torch.no_grad()`` or inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
