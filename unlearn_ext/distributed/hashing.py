"""Content hashes: of weights, so that a mask can say what it was made for, and of samples, to find duplicates."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .shards import full

__all__ = ["as_integers", "mixed_bits", "raw_bytes", "sample_hashes", "sample_numbers", "samples_hash"]
__all__ += ["weights_hash"]

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
# Odd multipliers make each factor a bijection modulo 2^64.
_MULTIPLIER, _POSITION = -7046029254386353131, -4417276706812531889


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in logical order, whatever its dtype and device."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())


def weights_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, shapes, dtypes and values. All ranks of a sharded model have to ask for it."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in named:
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(raw_bytes(full(tensor)))
    return digest.hexdigest()


def sample_hashes(inputs: Tensor | Mapping[str, Tensor]) -> list[bytes]:
    """One hash for each sample of a batch (the first dimension); of a dict, over all of its tensors.

    Of texts with an ``attention_mask`` [N, L] only what it keeps counts: the same text, padded to the length of another
    batch, is the same sample.
    """
    if isinstance(inputs, Tensor):
        inputs = inputs.detach().cpu().contiguous()
        header = _header(inputs.dtype, inputs.shape[1:])
        return [hashlib.blake2b(header + bytes(raw_bytes(sample)), digest_size=16).digest() for sample in inputs]
    mask = _padding_mask(inputs)
    kept = None if mask is None else mask.cpu()
    parts = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(inputs.items())}
    found = []
    for i in range(len(next(iter(parts.values())))):
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in parts.items():
            sample = tensor[i][kept[i]] if kept is not None and _is_padded(name, tensor, kept) else tensor[i]
            digest.update(f"{name}\0".encode() + _header(sample.dtype, sample.shape) + bytes(raw_bytes(sample)))
        found.append(digest.digest())
    return found


def _header(dtype: torch.dtype, shape: torch.Size) -> bytes:
    return f"{dtype}\0{list(shape)}\0".encode()


def _padding_mask(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Bool [N, L]: which tokens are no padding; None where nothing says so."""
    mask = inputs.get("attention_mask")
    return mask != 0 if mask is not None and mask.dim() == 2 else None


def _is_padded(name: str, tensor: Tensor, mask: Tensor) -> bool:
    """Whether a tensor has the padded tokens' dimension; an image of as many channels as there are tokens has not."""
    return tensor.shape == mask.shape or (name == "inputs_embeds" and tensor.shape[:2] == mask.shape)


def samples_hash(hashes: Iterable[bytes]) -> str:
    """A hash of a set of samples that does not depend on their order."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in sorted(hashes):
        digest.update(sample)
    return digest.hexdigest()


def as_integers(values: Tensor) -> Tensor:
    """The bit patterns, without a copy."""
    return values.view(_INTEGERS[values.element_size()])


def mixed_bits(values: Tensor, positions: Tensor) -> Tensor:
    """Each value's bit pattern, with its position, spread over 64 bits: a bijection of the pattern. On its device."""
    mixed = as_integers(values).long() ^ (positions * _POSITION)
    for factor in (_MULTIPLIER, _POSITION, _MULTIPLIER):
        mixed = (mixed ^ ((mixed >> 32) & 0xFFFFFFFF)) * factor  # the shift alone is arithmetic
    return mixed


def sample_numbers(inputs: Tensor | Mapping[str, Tensor], seed: int) -> Tensor:
    """One int64 for each sample of a batch, from its content and the seed alone, without waiting for its device. Of a
    dict, over all of its tensors; padding does not count, as in :func:`sample_hashes`."""
    if isinstance(inputs, Tensor):
        sums = _sums_of_bits(inputs)
    else:
        mask, sums = _padding_mask(inputs), None
        for name, tensor in sorted(inputs.items()):
            padded = mask is not None and _is_padded(name, tensor, mask)
            of_tensor = _sums_of_bits(tensor, mask if padded else None)
            of_tensor = mixed_bits(of_tensor, torch.full_like(of_tensor, zlib.crc32(name.encode())))
            sums = of_tensor if sums is None else sums + of_tensor
    return mixed_bits(sums, torch.full_like(sums, (seed + 1 + 2**63) % 2**64 - 2**63))


def _sums_of_bits(inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """A number for each sample, from its values and their places; those that ``mask`` [N, L] leaves out have none."""
    flat = inputs.detach().contiguous().reshape(inputs.shape[0], -1)
    flat = flat.to(torch.uint8) if flat.dtype == torch.bool else flat
    if mask is None:
        return mixed_bits(flat, torch.arange(flat.shape[1], device=flat.device)).sum(1)
    width = flat.shape[1] // max(1, mask.shape[1])  # of a token
    kept = mask.repeat_interleave(width, dim=1)
    return (mixed_bits(flat, kept.cumsum(1) - 1) * kept).sum(1)
