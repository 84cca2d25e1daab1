"""Masks and Fisher diagonals in the files of other projects: dictionaries of tensors that torch.save wrote.

SalUn (arXiv 2310.12508, OPTML-Group/Unlearn-Saliency) saves masks as int64 tensors of 0 and 1 by parameter name;
SFR-on (arXiv 2409.19732, K1nght/Unified-Unlearning-w-Remain-Geometry) saves masks as bool tensors, and the two Fisher
diagonals from which they come as float tensors. Where a parameter had no gradient, SFR-on leaves the number 0 in the
place of a tensor.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed.wrappers import by_plain_name
from ..errors import InputError
from ..utils.arguments import is_dense
from ..utils.files import atomic_path, user_path, writable_directory
from ..utils.reading import check_opens, check_stored

__all__ = ["MOST_DIMENSIONS", "read_fishers", "read_masks", "write_masks"]

_DTYPES: tuple[torch.dtype, ...] = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_DTYPES += (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_DIMENSIONS = 64  # that torch's operators take
_LARGEST_SHARE = 8  # bytes of tensors for each byte of the file: weights that are tied share theirs

Shapes = Mapping[str, tuple[int, ...]]


def read_masks(path: str | Path, shapes: Shapes | None = None) -> dict[str, Tensor]:
    """Bool tensors by plain name, from tensors of any dtype that hold 0 and 1 only.

    A plain 0 becomes a tensor of that name's shape, or is left out where ``shapes`` does not have the name.
    """
    masks = {}
    for name, value in _read(path).items():
        if _is_zero(value):
            if shapes is not None and name in shapes:
                masks[name] = torch.zeros(shapes[name], dtype=torch.bool, device="cpu")
            continue
        mask = _dense(path, name, value)
        masks[name] = mask != 0
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            raise InputError(f"{path} is no mask: {name} holds other values than 0 and 1")
    return _some(path, masks)


def _read_fisher(path: str | Path) -> dict[str, Tensor | None]:
    """Float32 or float64 tensors by plain name; None where the file has a plain 0."""
    fisher: dict[str, Tensor | None] = {}
    for name, value in _read(path).items():
        if _is_zero(value):
            fisher[name] = None
            continue
        squares = _dense(path, name, value)
        if not squares.is_floating_point():
            raise InputError(f"{path} is no Fisher diagonal: {name} is of {squares.dtype}, expected a floating dtype")
        squares = squares if squares.dtype in (torch.float32, torch.float64) else squares.float()
        if not bool(((squares >= 0) & (squares < torch.inf)).all()):
            raise InputError(f"{path} is no Fisher diagonal: {name} holds numbers that are negative or not finite")
        fisher[name] = squares
    return _some(path, fisher)


def read_fishers(
    forget: str | Path, retain: str | Path, parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The two diagonals of one model, of equal names and shapes: zeros where a file has a plain 0.

    A name that has a 0 in both files takes the shape of the trained one of ``parameters``, or is left out.
    """
    both = _read_fisher(forget), _read_fisher(retain)
    if both[0].keys() != both[1].keys():
        raise InputError(f"{forget} and {retain} hold different parameters: take two files of the same model")
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    filled: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for name in both[0]:
        pair = [fisher[name] for fisher in both]
        shapes = [tensor.shape for tensor in (*pair, trained.get(name)) if tensor is not None]
        if not shapes:
            continue
        for fisher, squares in zip(filled, pair, strict=True):
            fisher[name] = torch.zeros(shapes[0], device="cpu", dtype=torch.float32) if squares is None else squares
        if shapes[0] != filled[1][name].shape:
            raise InputError(
                f"{name} has shape {list(shapes[0])} in {forget} and {list(filled[1][name].shape)} in {retain}: take "
                "two files of the same model"
            )
    return filled


def write_masks(masks: Mapping[str, Tensor], path: str | Path) -> None:
    """A dictionary of tensors, whole or not at all, for ``torch.load(path, weights_only=True)``."""
    writable_directory(Path(path).parent)
    with atomic_path(path) as partial:
        try:
            torch.save(dict(masks), partial)
        except RuntimeError:  # "unexpected pos" is what torch says of a disk that is full
            raise OSError("torch could not write all of it") from None


def _read(path: str | Path) -> dict[str, Any]:
    """A pickled dictionary by plain name, without running any code that the pickle holds."""
    path = user_path(path)
    if not path.is_file():
        raise InputError(f"there is no file at {path}")
    check_stored(path)
    try:  # mapped where the format allows it: SalUn's mask of a diffusion model takes 7 GB
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception:  # what a damaged pickle trips over can be anything
        check_opens(path)
        raise InputError(
            f"{path} cannot be read as tensors alone (damaged, no file of torch.save, or with objects whose reading "
            "would run code): save a plain dictionary of tensors"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise InputError(f"{path} holds no dictionary of tensors by parameter name: got {_kind(found)}")
    _check_size(path, found)
    return by_plain_name(found.items())


def _check_size(path: str | Path, values: dict[str, Any]) -> None:
    """Whether the tensors are about as large as the file: some lines of a pickle can expand one number to 2^34."""
    size = sum(value.numel() * value.element_size() for value in values.values() if isinstance(value, Tensor))
    limit = _LARGEST_SHARE * os.path.getsize(path)
    if size > limit:
        raise InputError(
            f"{path} holds expanded tensors, of {size:.3g} bytes in a file of {limit // _LARGEST_SHARE}: save them "
            "with .contiguous()"
        )


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def _dense(path: str | Path, name: str, value: Any) -> Tensor:
    if not is_dense(value) or value.device.type != "cpu" or value.dtype not in _DTYPES:
        raise InputError(f"{path} holds no dictionary of tensors by parameter name: {name} is {_kind(value)}")
    if value.dim() > MOST_DIMENSIONS:
        raise InputError(f"{path}: {name} has {value.dim()} dimensions, and at most {MOST_DIMENSIONS} can be read")
    tensor: Tensor = value.detach()
    return tensor


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of layout {value.layout} and {value.dtype} on {value.device}"
    return "a dictionary with other keys" if isinstance(value, dict) else f"of type {type(value).__name__}"


def _some(path: str | Path, tensors: dict[str, Any]) -> dict[str, Any]:
    if not any(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"{path} holds no tensor: choose the file of a mask or a Fisher diagonal")
    return tensors
