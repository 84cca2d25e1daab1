"""Modes of the process that are the caller's and not the run's: gradients, autocast, inference mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["CallerModes", "run_modes"]


def _devices() -> list[str]:
    """Types of devices for which autocast may be on."""
    return ["cpu"] + ([torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else [])


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
    with torch.inference_mode(False), torch.enable_grad(), _autocast(off):
        yield


class CallerModes:
    """The modes in which it is made, for callbacks out of :func:`run_modes`. Inference mode becomes no_grad, so that a
    model which keeps tensors of its passes can go on training."""

    def __init__(self) -> None:
        self._gradients = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        self._autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _devices()
        }

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        with torch.set_grad_enabled(self._gradients), _autocast(self._autocast):
            yield
