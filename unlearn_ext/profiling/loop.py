"""The same-traffic loop and the triad: what the memory allows, measured beside the operators.

An operator is judged by the fraction of the loop's speed that it reaches; csrc/benchmark/loop.cpp says what the loop
does, and loop.cu is the same for CUDA. The loop is judged by the triad, and where it falls short no comparison to it is
made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..native import loading

__all__ = ["LOOP_OF_TRIAD", "Pass", "loop", "loop_holds", "triad", "triad_bytes"]

# The loop must reach this fraction of the triad's speed, in bytes or in bytes read, whichever is higher: a loop that
# only reads is limited by the loads that a core can have in flight, which the triad's stores do not compete for.
LOOP_OF_TRIAD = 0.9


@dataclass(frozen=True)
class Pass:
    """What one pass over memory moves: lists of tensors, one for each stream."""

    updated: Sequence[Sequence[Tensor]] = ()
    read: Sequence[Sequence[Tensor]] = ()
    words_read: Sequence[Tensor] = ()
    words_written: Sequence[Tensor] = ()

    @property
    def bytes_read(self) -> int:
        return sum(map(_bytes, (*self.updated, *self.read, self.words_read)))

    @property
    def bytes(self) -> int:
        return self.bytes_read + sum(map(_bytes, (*self.updated, self.words_written)))


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@functools.cache
def _schemas() -> torch.library.Library:
    """Once. The library object must live as long as its operators."""
    library = torch.library.Library("unlearn_ext_bench", "DEF")
    library.define(
        "same_traffic_(Tensor(a!)[] updated, Tensor[] read, Tensor[] words_read, Tensor(b!)[] words_written, "
        "int tensors, int mask) -> int"
    )
    library.define("triad_(Tensor(a!)[] a, Tensor[] b, Tensor[] c, float scale) -> ()")
    return library


def _kernels(device: torch.device) -> Any:
    """The kernels for a device, or None where the operators have none either, as on CUDA without nvcc."""
    if device.type != "cpu" and ops.backend(device) != "native":
        return None
    _schemas()
    if device.type == "cuda":
        loading.load_cuda_loop()
    else:
        loading.load_loop()
    return torch.ops.unlearn_ext_bench


def _flat(streams: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [tensor for stream in streams for tensor in stream]


def loop(passes: Sequence[Pass]) -> Callable[[], None]:
    """Runs over the operator's own tensors and leaves them as they are. Where there is no kernel PyTorch's own triad
    moves as many bytes."""
    kernels = _kernels(_device(passes))
    if kernels is None:
        return _stand_in(sum(p.bytes for p in passes), _device(passes))
    calls = []
    for p in passes:
        tensors = len((*p.updated, *p.read)[0])
        calls.append((_flat(p.updated), _flat(p.read), list(p.words_read), list(p.words_written), tensors, 0))

    def run() -> None:
        for call in calls:
            kernels.same_traffic_(*call)

    return run


def triad(a: Sequence[Tensor], c: Sequence[Tensor]) -> Callable[[], None]:
    """a = a + 0 · c over lists of float32 tensors: every byte that moves is one that counts, and a stays as it is."""
    kernels = _kernels(a[0].device)
    if kernels is None:
        return _stand_in(triad_bytes(a), a[0].device)
    a, c = list(a), list(c)
    return lambda: kernels.triad_(a, a, c, 0.0)


def triad_bytes(a: Sequence[Tensor]) -> int:
    return 3 * _bytes(a)


def loop_holds(passes: Sequence[Pass], loop_seconds: float, triad_speed: float) -> bool:
    """Whether the loop is good enough to judge by; ``triad_speed`` in bytes per second."""
    moved, read = sum(p.bytes for p in passes), sum(p.bytes_read for p in passes)
    of_triad = max(moved / triad_speed, read / (triad_speed * 2 / 3)) / loop_seconds
    return of_triad >= LOOP_OF_TRIAD


def _device(passes: Sequence[Pass]) -> torch.device:
    return (*passes[0].updated, *passes[0].read)[0][0].device


def _stand_in(moved: int, device: torch.device) -> Callable[[], None]:
    a, b, c = (torch.zeros(max(moved // 12, 1), device=device) for _ in range(3))
    return lambda: torch.add(b, c, alpha=0.5, out=a)
