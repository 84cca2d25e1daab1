"""Keys of files that may be used again: a hash of everything that what they hold depends on."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..distributed.hashing import raw_bytes
from ..native import loading, recipes
from ..utils.device import device_name
from ..utils.hashing import file_hash

__all__ = ["class_hash", "file_key", "kernels", "machine", "sources_hash", "tensor_hash"]

_PACKAGE = Path(__file__).resolve().parents[1]


def file_key(ingredients: dict[str, Any]) -> str:
    """A hash that changes with each of them."""
    text = json.dumps(ingredients, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def tensor_hash(tensor: Tensor) -> str:
    return hashlib.blake2b(bytes(raw_bytes(tensor)), digest_size=16).hexdigest()


def machine(device: str) -> dict[str, Any]:
    """What rounds differently, and takes another time."""
    gpu = {"gpu": device_name(device)} if torch.device(device).type == "cuda" else {}
    return {
        "device": device,
        "processor": device_name("cpu"),
        **gpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def kernels(device: str) -> str:
    """What the operators of a device are made from: the key that the build cache has for sources, compiler and flags,
    or the hash of a library that came ready; ``python`` where none is loaded, whose code is among the package's files.
    """
    if ops.backend(device) == "python":
        return "python"
    if torch.device(device).type == "cuda":
        from ..native.cuda import cuda_recipe

        return cuda_recipe().key
    if (library := loading.library_path()) is not None and library == loading._packaged_library():
        return file_hash(library)
    return recipes.cpu_recipe().key


@cache
def sources_hash(patterns: tuple[str, ...]) -> str:
    """Of the package's files that the patterns find: a result of other code is another result."""
    return _files_hash(file for pattern in patterns for file in _PACKAGE.glob(pattern))


def class_hash(kind: type) -> str:
    """Of the files that a class and those that it is derived from stand in, in whatever package; and of all sources of
    the class's own package, which may help it, where that is not this one."""
    found = (inspect.getsourcefile(one) for one in kind.__mro__ if one.__module__ not in ("builtins", "abc"))
    files = {Path(file) for file in found if file is not None}
    top = kind.__module__.partition(".")[0]
    if top != _PACKAGE.name:
        for directory in getattr(sys.modules.get(top), "__path__", ()):
            files |= set(Path(directory).rglob("*.py"))
    return _files_hash(files)


def _files_hash(files: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(set(files)):
        digest.update(f"{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
