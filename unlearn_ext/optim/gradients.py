"""Alignment of gradients with parameters: shapes, devices, dtypes, memory order, and parts over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter, eq
from types import NoneType
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from ..distributed.shards import all_local, is_sharded, local
from ..errors import InputError
from ..utils.arguments import describe
from ..utils.gradients import FLOATING, check_gradient, fits

__all__ = ["Gradients", "align_gradients", "cut_like", "state_dtype"]

Gradients: TypeAlias = list[Tensor | None]  # aligned with the parameters; None skips its parameter

_DEVICE, _DTYPE, _LAYOUT = attrgetter("device"), attrgetter("dtype"), attrgetter("layout")


def align_gradients(
    op: str, grads: Sequence[Tensor | None] | None, parameters: list[Tensor], name_of: Callable[[int], str]
) -> Gradients:
    """Gradients as the operators take them: of each parameter's shape and device, and in its memory order.

    Args:
        grads: one for each parameter, or None for their ``.grad``.
        name_of: the name of the parameter at an index, for errors.

    Raises:
        InputError: the list has the wrong length, or a gradient does not belong to its parameter.
    """
    if isinstance(grads, (str, Mapping)) or not isinstance(grads, (Iterable, NoneType)):
        raise InputError(f"{op}: expected a list of gradients in the parameters' order, got {describe(grads)}")
    aligned = [p.grad for p in parameters] if grads is None else list(grads)
    if len(aligned) != len(parameters):
        raise InputError(f"{op}: expected {len(parameters)} gradients, one for each parameter, got {len(aligned)}")
    if any(map(is_sharded, parameters)):
        aligned = [_local_part(op, name_of, i, *pair) for i, pair in enumerate(zip(aligned, parameters, strict=True))]
    placed = all_local(parameters)
    if _fit_as_they_are(aligned, placed):
        return aligned
    for i, (gradient, p) in enumerate(zip(aligned, placed, strict=True)):
        if gradient is not None:
            aligned[i] = _align_one(op, name_of, i, gradient, p)
    return aligned


def _align_one(op: str, name_of: Callable[[int], str], index: int, gradient: Tensor, p: Tensor) -> Tensor:
    if not fits(gradient):
        check_gradient(op, name_of(index), gradient)
    if gradient.shape != p.shape:
        raise InputError(
            f"{op}: the gradient of {name_of(index)} has shape {list(gradient.shape)} and the parameter "
            f"{list(p.shape)}: pass the gradients in the parameters' order"
        )
    if gradient.device != p.device:
        raise InputError(f"{op}: the gradient of {name_of(index)} is on {gradient.device}: expected one on {p.device}")
    if gradient.dtype == torch.float64 != p.dtype:
        # What overflows the type that the step computes in must be infinite when the norms look for it.
        gradient = gradient.to(state_dtype(p))
    if not _same_memory_order(gradient, p):  # once here, not once in each operator
        gradient = torch.empty_like(p, dtype=gradient.dtype).copy_(gradient)
    return gradient


def _local_part(op: str, name_of: Callable[[int], str], index: int, gradient: Any, p: Any) -> Tensor | None:
    """This rank's part of a sharded parameter's gradient; that of a whole parameter as it is."""
    if gradient is None or not is_sharded(p):
        return cast("Tensor | None", gradient)
    if not is_sharded(gradient) or gradient.device_mesh != p.device_mesh or gradient.shape != p.shape:
        raise InputError(
            f"{op}: the gradient of {name_of(index)} is not cut over the ranks as the parameter is: pass .grad as "
            "backward() leaves it"
        )
    return cut_like(gradient, p)


def cut_like(value: Any, p: Any) -> Tensor:
    """This rank's part of a sharded tensor, in the way that a parameter on the same ranks is cut."""
    return local(value if value.placements == p.placements else value.redistribute(placements=p.placements))


def _fit_as_they_are(grads: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> bool:
    """Whether all is as it mostly is. With hundreds of small tensors, looking at each in Python costs more than moving
    their weights, so the loops here are the interpreter's own, and keep no shapes, which would wake the garbage
    collector. No says nothing: a closer look decides."""
    present = cast("Sequence[Tensor]", grads)
    try:
        return bool(
            all(map(Tensor.is_contiguous, present))
            and all(map(Tensor.is_contiguous, parameters))
            and all(map(eq, map(Tensor.size, present), map(Tensor.size, parameters)))
            and all(map(eq, map(_DEVICE, present), map(_DEVICE, parameters)))
            and (dtypes := set(map(_DTYPE, present)))
            and dtypes <= FLOATING
            and (torch.float64 not in dtypes or set(map(_DTYPE, parameters)) == {torch.float64})
            and set(map(_LAYOUT, present)) == {torch.strided}
        )
    except (TypeError, RuntimeError):  # a gradient is None, or sparse
        return False


def _same_memory_order(a: Tensor, b: Tensor) -> bool:
    """Equal strides, up to dimensions of one element, which address nothing."""
    if a.stride() == b.stride():
        return True
    return all(x == y or n == 1 for x, y, n in zip(a.stride(), b.stride(), a.shape, strict=True))


def state_dtype(p: Tensor) -> torch.dtype:
    """The dtype of a weight's moments and slow copy: float32, or float64 for float64."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32
