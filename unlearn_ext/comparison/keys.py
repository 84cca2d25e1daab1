"""Keys of files that may be used again: a hash of everything that what they hold depends on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from ..distributed.hashing import raw_bytes
from ..utils.device import device_name
from ..version import __version__

__all__ = ["file_key", "machine", "tensor_hash"]


def file_key(ingredients: dict[str, Any]) -> str:
    """A hash that changes with each of them."""
    text = json.dumps(ingredients, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def tensor_hash(tensor: Tensor) -> str:
    return hashlib.blake2b(bytes(raw_bytes(tensor)), digest_size=16).hexdigest()


def machine(device: str) -> dict[str, Any]:
    """The machine and the versions of the software: others round differently, and take another time."""
    gpu = {"gpu": device_name(device)} if torch.device(device).type == "cuda" else {}
    return {
        "device": device,
        "processor": device_name("cpu"),
        **gpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "unlearn_ext": __version__,
    }
