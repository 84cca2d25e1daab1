"""Which weights a mask keeps: those of the largest scores, or of the largest ratios of two Fisher diagonals."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
from torch import Tensor

from .. import ops
from ..distributed.shards import is_sharded
from ..distributed.wrappers import by_plain_name
from ..errors import InputError
from ..utils.arguments import check_choice, describe, is_dense
from . import sharded
from ._parts import in_parts
from .storage import StoredSums

__all__ = ["bits_by_ratio", "bits_by_score", "check_fraction", "no_bits"]


def bits_by_score(
    scores: Mapping[str, Tensor], fraction: float, score: str, other: Mapping[str, Tensor] | None
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Bits of the largest scores, and the shapes of their tensors; :meth:`SaliencyMask.top_fraction`."""
    if not scores:
        raise InputError("scores of no tensors were given: pass one tensor per parameter name")
    named, others = by_plain_name(scores.items()), by_plain_name((other or {}).items())
    for name, value in (*named.items(), *others.items()):
        if not is_dense(value) or not value.is_floating_point():
            raise InputError(f"score of {name}: expected a dense tensor of a floating dtype, got {describe(value)}")
    check_choice("score", score, ops.SCORES)
    if others.keys() != (named.keys() if score in ("product", "ratio") else set()):
        raise InputError(f"score {score!r}: expected other to have the names of scores for product and ratio only")
    for name, value in others.items():
        if value.shape != named[name].shape:
            raise InputError(
                f"other of {name} has shape {list(value.shape)} and its score {list(named[name].shape)}: pass "
                "tensors of equal shapes"
            )
    check_fraction("fraction", fraction)
    bits, _ = ops.top_bits(
        [value.detach().contiguous() for value in named.values()],
        _part_of(sum(value.numel() for value in named.values()), fraction),
        other=[others[name].detach() for name in named if others],
        score=score,
    )
    words = {name: word.cpu() for name, word in zip(named, bits, strict=True)}
    return words, {name: tuple(value.shape) for name, value in named.items()}


def bits_by_ratio(
    forget: Mapping[str, Tensor],
    retain: Mapping[str, Tensor],
    seen: Set[str],
    *,
    gamma: float | None,
    mask_fraction: float | None,
    **ratio: float,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Bits from Fisher sums of equal names, and the setting that chose them; those not ``seen`` are kept out.

    ``ratio`` is eps, forget_scale and retain_scale of :func:`~unlearn_ext.ops.ratio_bits`.
    """
    if gamma is not None and mask_fraction is not None:
        raise InputError("gamma and mask_fraction both say which weights are salient: give one of them")
    if not forget:
        raise InputError("Fisher diagonals of no tensors were given: none holds a gradient")
    names = [name for name in forget if name in seen]
    if mask_fraction is None:
        gamma = 1.0 if gamma is None else gamma
        kept = _above_ratio(forget, retain, names, gamma=gamma, **ratio)
        origin = {"gamma": repr(gamma)}
    else:
        check_fraction("mask_fraction", mask_fraction)
        kept = _largest_ratios(forget, retain, names, mask_fraction, **ratio)
        origin = {"mask_fraction": repr(float(mask_fraction))}
    return {name: kept[name] if name in kept else no_bits(retain[name]) for name in forget}, origin


def _above_ratio(
    forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], names: list[str], **ratio: float
) -> dict[str, Tensor]:
    """Bits by name, a few tensors at a time; one by one of a forget Fisher that waits elsewhere and comes back here."""
    kept: dict[str, Tensor] = {}
    waits = isinstance(forget, StoredSums)
    for part in (slice(i, i + 1) for i in range(len(names))) if waits else in_parts([retain[name] for name in names]):
        f, r = [forget[name] for name in names[part]], [retain[name] for name in names[part]]
        if any(map(is_sharded, f)):
            words = _on_host(ops.pack_bits(sharded.ratio_masks(f, r, **ratio)))
        else:
            bits, _ = ops.ratio_bits(f, r, **ratio)
            words = _logical(bits, f)
        kept.update(zip(names[part], words, strict=True))
    return kept


def _largest_ratios(
    forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], names: list[str], mask_fraction: float, **ratio: float
) -> dict[str, Tensor]:
    """Bits by name of a fraction of all weights; ties are broken in logical order."""
    f, r = [forget[name].contiguous() for name in names], [retain[name] for name in names]
    k = _part_of(sum(total.numel() for total in retain.values()), mask_fraction)
    k = min(k, sum(total.numel() for total in f))
    if any(map(is_sharded, f)):
        words = _on_host(ops.pack_bits(sharded.top_ratio_masks(f, r, k, **ratio)))
    else:
        bits, _ = ops.top_bits(f, k, other=r, score="ratio", **ratio)
        words = _logical(bits, f)
    return dict(zip(names, words, strict=True))


def _logical(bits: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Bits on the CPU and in logical order, of those in the memory order of ``like``."""
    words = bits if all(word.device.type == "cpu" for word in bits) else _on_host(bits)
    for i, tensor in enumerate(like):
        if not tensor.is_contiguous():
            ordered = ops.unpack_bits([words[i]], [torch.empty_like(tensor, dtype=torch.bool, device="cpu")])[0]
            words[i] = ops.pack_bits([ordered.contiguous()])[0]
    return words


def _on_host(words: list[Tensor]) -> list[Tensor]:
    """In one copy: each would wait for the device."""
    return list(torch.split(torch.cat(words).cpu(), [word.numel() for word in words]))


def no_bits(like: Tensor) -> Tensor:
    """Words of a tensor of which nothing is kept."""
    return torch.zeros((like.numel() + 31) // 32, dtype=torch.int32, device="cpu")


def check_fraction(name: str, fraction: float) -> None:
    """Raises InputError unless it is a number from 0 to 1."""
    if not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
        raise InputError(f"{name}: expected a number from 0 to 1, got {describe(fraction)}")


def _part_of(total: int, fraction: float) -> int:
    """⌊fraction·total⌋ of the fraction that was meant: the largest k with k/total ≤ fraction in float64."""
    k = int(fraction * total)
    while k < total and (k + 1) / total <= fraction:
        k += 1
    while k > 0 and k / total > fraction:
        k -= 1
    return k
