"""Files of masks: safetensors of the words by name, with shapes and metadata in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed.wrappers import by_plain_name
from ..errors import InputError, first_line
from ..utils.files import atomic_path, user_path, writable_directory
from ..utils.reading import explain_open_errors
from .foreign import MOST_DIMENSIONS

__all__ = ["as_text", "numel", "read_mask", "write_mask"]

_FORMAT = "unlearn_ext.saliency_mask.1"
_RESERVED = ("format", "shapes")  # keys of the header


def write_mask(
    path: str | Path,
    bits: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
) -> None:
    """Writes what :func:`read_mask` reads, whole or not at all."""
    from safetensors.torch import save_file

    # The user may have added to the metadata.
    header = {**as_text(metadata), "format": _FORMAT, "shapes": json.dumps(shapes)}
    writable_directory(Path(path).parent)
    with atomic_path(path) as partial:
        save_file({name: word.contiguous() for name, word in bits.items()}, partial, metadata=header)


def read_mask(path: str | Path) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]], dict[str, str]]:
    """Bits and shapes by name, in the model's order, and metadata.

    Raises:
        InputError: no such file, or not a mask.
    """
    header, bits = _read(user_path(path))
    if header.pop("format", None) != _FORMAT:
        raise InputError(f"{path} is not a saliency mask of this package: save one with SaliencyMask.save")
    try:
        shapes = {name: _shape(sizes) for name, sizes in json.loads(header.pop("shapes")).items()}
    except (KeyError, ValueError, AttributeError, TypeError, RuntimeError, RecursionError):
        raise InputError(f"{path} is damaged: its shapes cannot be read") from None
    if shapes.keys() != bits.keys():
        raise InputError(f"{path} is damaged: it has bits and shapes of different parameters")
    shapes, bits = by_plain_name(shapes.items()), by_plain_name(bits.items())
    ordered = {name: bits[name] for name in shapes}  # safetensors sorts by size, shapes keep the model's order
    for name, word in ordered.items():
        size = numel(shapes[name])
        fits = word.dtype == torch.int32 and word.shape == ((size + 31) // 32,)
        if not fits or (size % 32 and int(word[-1]) >> size % 32 != 0):
            raise InputError(f"{path} is damaged: the bits of {name} do not fit its shape {list(shapes[name])}")
    return ordered, shapes, header


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a safetensors file of words; nothing larger than the file is made.

    Raises:
        InputError: no such file, or one that is damaged or holds other tensors.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise InputError(f"there is no mask at {path}")
    bits = {}
    try:
        with explain_open_errors(path), safe_open(path, framework="pt", device="cpu") as file:
            header = dict(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118 - not a dict
                if file.get_slice(name).get_dtype() != "I32":  # of some dtypes torch has no tensors
                    raise InputError(f"{path} is no mask: {name} is not of int32 words")
                with torch.device("cpu"):  # not on torch's default device
                    bits[name] = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a safetensors file ({first_line(error)})") from None
    return header, bits


def _shape(sizes: Any) -> tuple[int, ...]:
    """A shape as a tensor can have it, from what a file says; raises what torch, or Python, raises for any other."""
    if not isinstance(sizes, list) or not all(type(size) is int for size in sizes):
        raise TypeError("a shape is a list of integers")
    if len(sizes) > MOST_DIMENSIONS:
        raise ValueError(f"a tensor has at most {MOST_DIMENSIONS} dimensions")
    return tuple(torch.empty(sizes, dtype=torch.bool, device="meta").shape)


def as_text(metadata: Mapping[Any, Any]) -> dict[str, str]:
    """As the header of a file holds it, beside what the file says for itself."""
    for key in _RESERVED:
        if key in metadata:
            raise InputError(f"metadata: {key!r} is what a file of a mask says for itself; choose another name")
    return {str(key): str(value) for key, value in metadata.items()}


def numel(shape: tuple[int, ...]) -> int:
    """How many weights a tensor of this shape has."""
    return torch.Size(shape).numel()
