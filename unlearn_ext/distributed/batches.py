"""This rank's samples of a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from .ranks import Ranks

__all__ = ["cloned", "cut", "map_tensors", "own_part", "without_inference"]


def own_part(batch: Any, size: int, ranks: Ranks) -> tuple[Any, int]:
    """This rank's part of a prepared batch of ``size`` samples, and how many samples count.

    A rank that gets none takes part all the same, since the others wait for it in every backward pass: with the first
    sample, which counts nothing.
    """
    part = ranks.part(size)
    count = part.stop - part.start
    if ranks.size == 1:
        return batch, count
    return cut(batch, part if count else slice(0, 1)), count


def cut(batch: Any, samples: slice) -> Any:
    """These samples of a prepared batch; numbers without a first dimension stay as they are."""
    return map_tensors(batch, lambda tensor: tensor[samples] if tensor.dim() else tensor)


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Applies a function to every tensor of a tuple, list or dict of tensors."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, function) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [map_tensors(value, function) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)  # a named tuple takes each
    return batch


def cloned(batch: Any) -> Any:
    """A raw batch to be held while others are taken: some loaders fill the same tensors anew for each. Of the same
    types; what cannot be copied stays as it is."""
    if isinstance(batch, Tensor):
        return batch.clone()
    if type(batch) in (list, tuple) or hasattr(batch, "_fields"):
        parts = map(cloned, batch)
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    try:
        result = copy.copy(batch)
    except Exception:  # of the user's class
        return batch
    attributes = getattr(result, "__dict__", {})
    for parts in (result, attributes) if isinstance(result, MutableMapping) else (attributes,):
        for name, part in list(parts.items()):
            if isinstance(part, (Tensor, list, tuple, dict)) or type(part).__module__ == "numpy":
                parts[name] = cloned(part)
    return result


def without_inference(batch: Any) -> Any:
    """A prepared batch through which gradients can pass: tensors that were made in inference mode are copied."""
    if not _holds_inference(batch):
        return batch
    return map_tensors(batch, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


def _holds_inference(batch: Any) -> bool:
    if isinstance(batch, Tensor):
        return batch.is_inference()
    if isinstance(batch, Mapping):
        return any(map(_holds_inference, batch.values()))
    return isinstance(batch, (tuple, list)) and any(map(_holds_inference, batch))
