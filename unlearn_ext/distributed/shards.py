"""Tensors of which each rank holds a part, as ``fully_shard`` makes them: DTensors over a device mesh.

Operators take plain tensors. What is computed from a rank's own part alone stands as it is; a sum over all weights is
reduced over the groups that :func:`shard_groups` names.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["all_local", "full", "is_sharded", "local", "part_like", "positions", "shard_groups", "sum_over"]
__all__ += ["whole_like"]


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor. There is none where nobody has imported their module, which takes its time."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing its memory; the tensor itself where it is whole."""
    return tensor.to_local().detach() if is_sharded(tensor) else tensor  # the other order costs ten times as much


def all_local(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """This rank's parts of a list, which is returned as it is where nothing can be cut."""
    return [local(tensor) for tensor in tensors] if "torch.distributed.tensor" in sys.modules else tensors


def shard_groups(tensor: Tensor) -> tuple[Any, ...]:
    """The process groups over which it is cut, outermost first; none where every rank holds all of it.

    Raises:
        InputError: its parts are terms of a sum, or cut in a way that only its own library can undo.
    """
    if not is_sharded(tensor):
        return ()
    from torch.distributed.tensor import Replicate, Shard

    groups = []
    for dim, placement in enumerate(tensor.placements):
        if type(placement) is Shard:
            if tensor.device_mesh.size(dim) > 1:
                groups.append(tensor.device_mesh.get_group(dim))
        elif not isinstance(placement, Replicate):
            raise InputError(
                f"a weight is placed as {placement} over the ranks: only DistributedDataParallel and fully_shard, with "
                "whole rows in each part, are supported"
            )
    return tuple(groups)


def sum_over(groups: Sequence[Any], values: Tensor) -> Tensor:
    """The sum of ``values`` over all ranks of these groups, on all of them."""
    for group in groups:
        torch.distributed.all_reduce(values, group=group)
    return values


@torch.no_grad()
def full(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank; all of them have to ask for it."""
    if not is_sharded(tensor):
        return tensor.detach()
    if tensor.dtype == torch.bool:  # not every backend gathers it
        return full(tensor.view(torch.uint8)).view(torch.bool)
    return tensor.detach().full_tensor()


def whole_like(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor from the ranks' parts, cut as ``like`` is; where that is plain the part is the whole."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    contiguous = torch.empty(like.shape, device="meta").stride()
    placed = DTensor.from_local(
        part.contiguous(), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=contiguous
    )
    return full(placed)


def part_like(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that it holds whole, cut as ``like`` is: a view."""
    if not is_sharded(like):
        return whole
    shape, start = _extent(like)
    return whole[tuple(slice(at, at + size) for at, size in zip(start, shape, strict=True))]


def positions(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Places in the whole tensor, in logical (C) order, of weights ``start`` to ``stop`` of this rank's part."""
    places = torch.arange(start, stop, device=local(tensor).device)
    if not is_sharded(tensor):
        return places
    shape, first = _extent(tensor)
    strides = torch.empty(tensor.shape, device="meta").stride()
    indices = torch.unravel_index(places, shape)
    return sum(((at + i) * stride for at, i, stride in zip(first, indices, strides, strict=True)), places * 0)


def _extent(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and first index of this rank's part."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(start)
