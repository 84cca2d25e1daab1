"""Gradients taken in the backward pass, some at a time, while they are in the cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .._in_backward import consuming

__all__ = ["arriving"]

# Bytes that wait for others, so that small tensors share a call: on the CPU few, as they are to be freed at once.
_WAITING = {"cpu": 1 << 18}
_WAITING_ELSEWHERE = 64 << 20


@contextlib.contextmanager
def arriving(parameters: Mapping[str, nn.Parameter], take: Callable[[dict[str, Tensor]], None]) -> Iterator[set[str]]:
    """Within the block ``take`` gets every gradient by name, some together; ``.grad`` stays empty, as in
    :func:`~unlearn_ext._in_backward.consuming`.

    Yields:
        The names of the parameters that had a gradient, so far.
    """
    names = list(parameters)
    waiting: dict[str, Tensor] = {}
    seen: set[str] = set()
    size = 0

    def flush() -> None:
        nonlocal size
        size = 0
        if waiting:
            with torch.no_grad():
                take(waiting)
            waiting.clear()

    def arrived(i: int, gradient: Tensor) -> None:
        nonlocal size
        seen.add(names[i])
        waiting[names[i]] = gradient
        size += gradient.nbytes
        if size >= _WAITING.get(gradient.device.type, _WAITING_ELSEWHERE):
            flush()

    with consuming(list(parameters.values()), names.__getitem__, arrived):
        yield seen
    flush()
