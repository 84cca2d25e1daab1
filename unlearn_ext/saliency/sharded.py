"""Masks from Fisher diagonals of which each rank holds a part. Every rank gets the same, whole masks."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..distributed.shards import all_local, shard_groups, sum_over, whole_like

__all__ = ["ratio_masks", "top_ratio_masks"]


def ratio_masks(forget: Sequence[Tensor], retain: Sequence[Tensor], gamma: float, **ratio: float) -> list[Tensor]:
    """Whole bool tensors of (F_f + eps) / (F_r + eps) ≥ gamma, by :func:`~unlearn_ext.ops.ratio_bits`."""
    own = all_local(forget)
    bits, _ = ops.ratio_bits(own, all_local(retain), gamma=gamma, **ratio)
    return [whole_like(mask, like) for mask, like in zip(ops.unpack_bits(bits, own), forget, strict=True)]


def top_ratio_masks(forget: Sequence[Tensor], retain: Sequence[Tensor], k: int, **ratio: float) -> list[Tensor]:
    """The k largest ratios over all weights of all ranks, ties in the order of the list, then in logical order.

    The k-th largest ratio is found by halving the interval of floating-point numbers that it lies in: ratios are not
    negative, and the bit patterns of such numbers are in their order. Each of the 31 (float64: 63) cuts counts the
    ratios above it, in one pass over memory and one sum over the ranks; no weight leaves its rank before the mask does.
    """
    wide = any(total.dtype == torch.float64 for total in (*forget, *retain))
    if wide:  # as top_bits: one type for all
        forget, retain = ([total.double() for total in totals] for totals in (forget, retain))
    number, pattern = ("d", "q") if wide else ("f", "i")
    groups = [shard_groups(total) for total in forget]
    own_forget, own_retain = all_local(forget), all_local(retain)

    def value(bits: int) -> float:
        (read,) = struct.unpack(number, struct.pack(pattern, bits))
        return float(read)

    def above(gamma: float) -> int:
        """How many ratios reach gamma, over all ranks."""
        _, counts = ops.ratio_bits(own_forget, own_retain, gamma=gamma, **ratio)
        total = 0
        for ranks in dict.fromkeys(groups):
            mine = [count for count, own in zip(counts.unbind(), groups, strict=True) if own == ranks]
            total += int(sum_over(ranks, torch.stack(mine).sum().to(own_forget[0].device)))
        return total

    (infinite,) = struct.unpack(pattern, struct.pack(number, float("inf")))
    low, high = 0, infinite + 1  # at least k ratios reach the value of low, if any cut does; fewer that of high
    while high - low > 1:
        middle = (low + high) // 2
        if above(value(middle)) >= k:
            low = middle
        else:
            high = middle
    threshold = value(low)
    at_least = ratio_masks(forget, retain, threshold, **ratio)
    if high > infinite:  # k = 0, or that many are infinite
        more = [torch.zeros_like(mask) for mask in at_least]
    else:
        more = ratio_masks(forget, retain, value(high), **ratio)
    left = k - sum(int(mask.sum()) for mask in more)
    found = []
    for above_it, reach in zip(more, at_least, strict=True):
        ties = (reach & ~above_it).flatten()
        taken = ties & (ties.cumsum(0) <= left)
        left -= int(taken.sum())
        found.append(above_it | taken.view(above_it.shape))
    return found
