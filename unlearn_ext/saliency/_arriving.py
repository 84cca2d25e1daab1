"""Gradients taken as the backward pass makes them, while they are in the cache, and freed at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError

__all__ = ["arriving", "in_parts"]

# Bytes that one call of an operator takes: on the CPU what its cache may hold, elsewhere enough that the call itself
# costs little beside them.
_AT_ONCE = {"cpu": 4 << 20}
_AT_ONCE_ELSEWHERE = 64 << 20


@contextlib.contextmanager
def arriving(parameters: Mapping[str, nn.Parameter], take: Callable[[dict[str, Tensor]], None]) -> Iterator[set[str]]:
    """Inside the block ``take`` gets every gradient by name, some at a time, and ``.grad`` stays empty.

    Yields:
        The names of the parameters that had a gradient, so far.

    Raises:
        InputError: a parameter's gradient came in parts, as reentrant checkpointing gives that of a shared weight: what
            was taken was no gradient.
    """
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

    def hook(name: str) -> Callable[[Tensor], None]:
        def arrived(p: Tensor) -> None:
            nonlocal size
            if name in seen:
                raise InputError(
                    f"the gradient of {name} came in parts: use gradient checkpointing with use_reentrant=False"
                )
            seen.add(name)
            waiting[name], p.grad = p.grad, None
            size += waiting[name].nbytes
            if size >= _limit(p.device):
                flush()

        return arrived

    handles = [p.register_post_accumulate_grad_hook(hook(name)) for name, p in parameters.items()]
    try:
        yield seen
        flush()
    finally:
        for handle in handles:
            handle.remove()
        for p in parameters.values():
            p.grad = None


def in_parts(tensors: Sequence[Tensor], device: torch.device) -> Iterator[slice]:
    """Neighbours in a list that one call of an operator should take, about as many bytes each time."""
    start = size = 0
    for i, tensor in enumerate(tensors):
        size += tensor.nbytes
        if size >= _limit(device) or i == len(tensors) - 1:
            yield slice(start, i + 1)
            start, size = i + 1, 0


def _limit(device: torch.device) -> int:
    return _AT_ONCE.get(device.type, _AT_ONCE_ELSEWHERE)
