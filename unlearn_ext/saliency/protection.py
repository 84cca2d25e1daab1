"""Proof that protected weights did not move: a hash of exactly those bits, without a copy of the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..distributed.hashing import mixed_bits
from ..distributed.shards import local, positions, shard_groups, sum_over
from ..errors import ProtectionError

__all__ = ["check_protected", "protected_count", "protected_hashes"]

_CHUNK = 1 << 22  # weights hashed at once: bounds the temporaries


@torch.no_grad()
def protected_hashes(weights: Sequence[Tensor], bits: Sequence[Tensor]) -> list[int]:
    """One 64-bit hash for each tensor over the bit patterns and positions of weights whose bit is 0.

    It is a sum modulo 2^64 of mixed terms, of which a change of one weight always changes one, so it does not depend on
    threads, devices, or the ranks that a tensor is cut over, whose sums are added.
    """
    result = []
    for whole, words in zip(weights, bits, strict=True):
        weight = local(whole)
        keep = ops.unpack_bits([words], [weight])[0]
        raw = weight.detach().contiguous().flatten()
        free = keep.contiguous().flatten()
        total = torch.zeros((), dtype=torch.int64, device=weight.device)
        for start in range(0, raw.numel(), _CHUNK):
            part = raw[start : start + _CHUNK]
            mixed = mixed_bits(part, positions(whole, start, start + part.numel()))
            total += torch.where(free[start : start + _CHUNK], 0, mixed).sum()
        result.append(int(sum_over(shard_groups(whole), total)))
    return result


def protected_count(weights: Sequence[Tensor], bits: Sequence[Tensor]) -> int:
    """Weights whose bit is 0, those of other ranks included."""
    total = sum(w.numel() for w in weights)
    for weight, count in zip(weights, ops.count_bits(list(bits)), strict=True):
        total -= int(sum_over(shard_groups(weight), count.clone().to(local(weight).device)))
    return total


def check_protected(named: Sequence[tuple[str, Tensor]], bits: Sequence[Tensor], before: Sequence[int]) -> int:
    """How many weights are protected, all of which must have the hashes that they had before.

    Raises:
        ProtectionError: some have changed; the message names the tensor.
    """
    weights = [weight for _, weight in named]
    for (name, _), old, new in zip(named, before, protected_hashes(weights, bits), strict=True):
        if old != new:
            raise ProtectionError(f"protected weights of {name} have changed: something else wrote to them")
    return protected_count(weights, bits)
