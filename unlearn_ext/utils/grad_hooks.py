"""Gradients taken in the backward pass: each as soon as it is whole, and freed before the next layers' appear."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["arriving", "consuming", "keeping_graphs", "passing_twice"]

# Bytes that wait for others, so that small tensors share a call: on the CPU few, as they are to be freed at once.
_WAITING = {"cpu": 1 << 18}
_WAITING_ELSEWHERE = 64 << 20


@contextlib.contextmanager
def consuming(
    parameters: Sequence[Tensor], name_of: Callable[[int], str], take: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Within the block ``take(i, gradient)`` gets parameter i's gradient once it is summed over all uses of the
    parameter, and ``.grad`` is freed.

    Raises:
        InputError: a gradient is there already, comes in parts, or is reduced over several processes afterwards.
    """
    if any(p.grad is not None for p in parameters):
        raise InputError("a step in the backward pass starts without gradients: call zero_grad() first")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        raise InputError(
            "several processes reduce their gradients after the hooks of the backward pass: leave "
            "optimizer_in_backward out"
        )
    taken: set[int] = set()

    def hook_of(i: int) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            if i in taken:
                raise InputError(
                    f"the gradient of {name_of(i)} came in parts and its first part has been used: call backward() "
                    "once, and checkpoint activations with use_reentrant=False"
                )
            taken.add(i)
            gradient, p.grad = p.grad, None
            assert gradient is not None  # the hook comes after it
            with torch.no_grad():
                take(i, gradient)

        return hook

    handles = [p.register_post_accumulate_grad_hook(hook_of(i)) for i, p in enumerate(parameters) if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def arriving(
    parameters: Sequence[Tensor], name_of: Callable[[int], str], take: Callable[[dict[int, Tensor]], None]
) -> Iterator[None]:
    """As :func:`consuming`, with some gradients at a time, by their parameters' places: ``take`` gets small ones
    together, while they are in the cache. Where the block fails, those that wait are dropped."""
    waiting: dict[int, Tensor] = {}
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
        waiting[i] = gradient
        size += gradient.numel() * gradient.element_size()  # nbytes is not for sparse ones
        if size >= _WAITING.get(gradient.device.type, _WAITING_ELSEWHERE):
            flush()

    with consuming(parameters, name_of, arrived):
        yield
    flush()


@contextlib.contextmanager
def keeping_graphs(needed: bool = True) -> Iterator[None]:
    """Backward passes that torch.compile makes in the block can be made twice over a graph: as a rule they overwrite
    what the forward pass saved for them."""
    if not needed:
        yield
        return
    from torch._functorch import config

    with config.patch(donated_buffer=False):
        yield


@contextlib.contextmanager
def passing_twice() -> Iterator[None]:
    """Around the first of two backward passes over a graph, ``backward(retain_graph=True)``.

    Raises:
        InputError: the backward pass was compiled before, outside of :func:`keeping_graphs`.
    """
    try:
        yield
    except RuntimeError as error:
        if "donated buffers" not in str(error):
            raise
        raise InputError(
            "a norm is measured in a backward pass of its own, and the model was compiled for one pass: set "
            "torch._functorch.config.donated_buffer = False before its first pass (or call torch.compiler.reset() now)"
        ) from None
