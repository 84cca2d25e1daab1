"""Content hashes: of weights, so that a mask can say what it was made for, and of samples, to find duplicates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["file_hash", "raw_bytes", "sample_hashes", "samples_hash", "weights_hash"]


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in logical order, whatever its dtype and device."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())


def weights_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, shapes, dtypes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in named:
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(raw_bytes(tensor))
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


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as others publish it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
