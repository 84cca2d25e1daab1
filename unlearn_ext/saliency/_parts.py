"""How much of a list of tensors one call of an operator takes, where the whole list is not wanted at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

__all__ = ["in_parts"]

# Bytes of one list: on the CPU what its cache may hold, elsewhere enough that the call itself costs little beside them.
_AT_ONCE = {"cpu": 4 << 20}
_AT_ONCE_ELSEWHERE = 64 << 20


def in_parts(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Neighbours in a list, so many that they reach that size."""
    start = size = 0
    for i, tensor in enumerate(tensors):
        size += tensor.nbytes
        if size >= _AT_ONCE.get(tensor.device.type, _AT_ONCE_ELSEWHERE) or i == len(tensors) - 1:
            yield slice(start, i + 1)
            start, size = i + 1, 0
