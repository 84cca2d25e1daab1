"""Content hashes: of weights, so that a mask can say what it was made for, and of samples, to find duplicates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ._shards import full

__all__ = ["file_hash", "mixed_bits", "raw_bytes", "sample_hashes", "sample_numbers", "samples_hash", "weights_hash"]

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


def sample_hashes(inputs: Tensor) -> list[bytes]:
    """One hash for each sample of a batch (the first dimension)."""
    inputs = inputs.detach().cpu().contiguous()
    header = f"{inputs.dtype}\0{list(inputs.shape[1:])}\0".encode()
    return [hashlib.blake2b(header + bytes(raw_bytes(sample)), digest_size=16).digest() for sample in inputs]


def samples_hash(hashes: Iterable[bytes]) -> str:
    """A hash of a set of samples that does not depend on their order."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in sorted(hashes):
        digest.update(sample)
    return digest.hexdigest()


def mixed_bits(values: Tensor, positions: Tensor) -> Tensor:
    """Each value's bit pattern, with its position, spread over 64 bits: a bijection of the pattern. On its device."""
    mixed = values.view(_INTEGERS[values.element_size()]).long() ^ (positions * _POSITION)
    for factor in (_MULTIPLIER, _POSITION, _MULTIPLIER):
        mixed = (mixed ^ ((mixed >> 32) & 0xFFFFFFFF)) * factor  # the shift alone is arithmetic
    return mixed


def sample_numbers(inputs: Tensor, seed: int) -> Tensor:
    """One int64 for each sample of a batch, from its content and the seed alone, without waiting for its device."""
    flat = inputs.detach().contiguous().reshape(inputs.shape[0], -1)
    flat = flat.to(torch.uint8) if flat.dtype == torch.bool else flat
    positions = torch.arange(flat.shape[1], device=flat.device)
    sums = mixed_bits(flat, positions).sum(1)
    return mixed_bits(sums, torch.full_like(sums, seed + 1))


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as others publish it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
