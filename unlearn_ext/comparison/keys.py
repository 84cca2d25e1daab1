"""Keys of files that may be used again: a hash of everything that what they hold depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._hashing import raw_bytes

__all__ = ["file_key", "machine", "sources_hash", "tensor_hash"]

_PACKAGE = Path(__file__).resolve().parents[1]


def file_key(ingredients: dict[str, Any]) -> str:
    """A hash that changes with each of them."""
    text = json.dumps(ingredients, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def tensor_hash(tensor: Tensor) -> str:
    return hashlib.blake2b(bytes(raw_bytes(tensor)), digest_size=16).hexdigest()


def machine(device: str) -> dict[str, Any]:
    """What rounds differently, and takes another time."""
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


@cache
def sources_hash(paths: Iterable[str]) -> str:
    """Of the package's files and folders by their paths in it: a result of other code is another result."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(paths):
        whole = _PACKAGE / path
        for file in sorted(whole.rglob("*.py")) if whole.is_dir() else [whole]:
            digest.update(f"{file.relative_to(_PACKAGE)}\0".encode() + file.read_bytes())
    return digest.hexdigest()
