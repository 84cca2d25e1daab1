"""Images or latents with labels in .npz and safetensors files, read row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ._array_files import Array, read_arrays
from ._source import HASHED_BYTES, as_pixels, known_classes

__all__ = ["array_labels", "open_arrays"]

_KINDS = {"images": "pixel_values", "latents": "latents", "latent_mean": "latent_moments"}
_ROWS_LOOKED_AT = 64  # when an array is opened
_LARGEST_PIXEL = 1.001  # float16 and resampling round


def open_arrays(
    path: Path,
    size: tuple[int, int] | None,
    channels: int | None,
    classes: int | None,
    latent_size: tuple[int, int] | None,
    latent_channels: int | None,
) -> tuple[ArrayFile, str]:
    """The samples, and their kind."""
    arrays = read_arrays(path)
    kinds = [key for key in _KINDS if key in arrays]
    if len(kinds) != 1:
        got = f"it holds {' and '.join(kinds)}" if kinds else "it holds none of them"
        raise InputError(f"{path}: expected one of images, latents, or latent_mean with latent_std; {got}")
    if ("latent_mean" in arrays) != ("latent_std" in arrays):
        raise InputError(f"{path}: latent_mean needs latent_std beside it")
    labels, main = array_labels(path, arrays), arrays[kinds[0]]
    if not main.shape or main.shape[0] == 0:
        raise InputError(f"{path} has no samples")
    if labels.shape[0] != main.shape[0]:
        raise InputError(f"{path} has {main.shape[0]} samples and {labels.shape[0]} labels: they must pair up")
    values = labels.all().to(torch.int64)
    for label in (int(values.min()), int(values.max())):
        if label < 0 or (classes is not None and label >= classes):
            limits = "labels are counted from 0" if classes is None else known_classes(classes)
            raise InputError(f"{path} has the label {label}: {limits}")
    if kinds[0] == "images":
        if size is None or channels is None:
            raise InputError(f"{path} holds images, and the model takes latents only: give it latents, or a VAE")
        source: ArrayFile = _Images(path, main, values, size, channels)
    else:
        if latent_size is None or latent_channels is None:
            raise InputError(f"{path} holds latents, and the model takes images: give it images")
        parts = {key: arrays[key] for key in ("latents", "latent_mean", "latent_std") if key in arrays}
        source = _Latents(path, parts, values, (latent_channels, *latent_size))
    return source, _KINDS[kinds[0]]


def array_labels(path: Path, arrays: Mapping[str, Array]) -> Array:
    if "labels" not in arrays:
        raise InputError(f"{path} has no labels: add an array of integers, one for each sample")
    labels = arrays["labels"]
    if labels.dtype.is_floating_point or labels.dtype.is_complex or len(labels.shape) != 1:
        raise InputError(f"{path}: labels: expected integers of shape [N], got {labels.dtype} {list(labels.shape)}")
    return labels


class ArrayFile:
    path: Path
    labels: Tensor
    _parts: dict[str, Array]

    def held_bytes(self, count: int) -> int:
        return sum(array.nbytes for array in self._parts.values())

    def name(self, index: int) -> str:
        return f"sample {index} of {self.path}"

    def digest(self, update: Callable[[bytes], None]) -> str:
        size = self.path.stat().st_size
        update(f"{size}\0".encode())
        with open(self.path, "rb") as file:
            if size <= HASHED_BYTES:
                while block := file.read(1 << 20):
                    update(block)
                return "the whole file"
            blocks, length = 1024, HASHED_BYTES // 1024
            for i in range(blocks):
                file.seek(i * (size - length) // (blocks - 1))
                update(file.read(length))
        return f"the file's size and {blocks} of its blocks, {HASHED_BYTES} bytes in all"


class _Images(ArrayFile):
    def __init__(self, path: Path, array: Array, labels: Tensor, size: tuple[int, int], channels: int):
        self.path, self._array, self.labels = path, array, labels
        self._parts = {"images": array}
        shape = array.shape[1:]
        shapes = {"chw": (channels, *size), "hwc": (*size, channels)}
        if channels == 1:
            shapes["hw"] = size
        self._order = next((order for order, expected in shapes.items() if shape == expected), None)
        if self._order is None:
            raise InputError(
                f"{path} has images of shape {list(shape)}, and the model takes {list(shapes['chw'])} or "
                f"{list(shapes['hwc'])}: resize them, or give pictures in class folders, which are resized"
            )
        self._bytes = array.dtype == torch.uint8
        if not self._bytes and not array.dtype.is_floating_point:
            raise InputError(f"{path}: images: expected uint8, or floats in [-1, 1], got {array.dtype}")
        count = array.shape[0]
        looked = min(count, _ROWS_LOOKED_AT)
        rows = [self.read(i * count // looked)["pixel_values"] for i in range(looked)]
        if not self._bytes and min(float(row.min()) for row in rows) >= 0:
            raise InputError(f"{path} has no pixel below 0: floats must be in [-1, 1]; scale them by 2 x - 1")
        if self._bytes and abs(max(float(row.max()) for row in rows) - (2 / 255 - 1)) < 1e-6:
            raise InputError(f"{path} has no byte above 1: black is 0 and white is 255; multiply them by 255")

    @property
    def preprocessing(self) -> dict[str, Any]:
        return {"scale": "2 x / 255 - 1" if self._bytes else "none", "order": self._order, "range": [-1, 1]}

    def read(self, index: int, keep: bool = False) -> dict[str, Tensor]:
        row = self._array.row(index)
        if self._order == "hwc":
            row = row.permute(2, 0, 1).contiguous()
        elif self._order == "hw":
            row = row[None]
        if self._bytes:
            return {"pixel_values": as_pixels(row)}
        row = row.to(torch.float32)
        if not bool(row.isfinite().all()) or float(row.abs().max()) > _LARGEST_PIXEL:
            raise InputError(
                f"{self.name(index)} has pixels from {float(row.min()):g} to {float(row.max()):g}: floats must be in "
                "[-1, 1]; save bytes as uint8"
            )
        return {"pixel_values": row}


class _Latents(ArrayFile):
    def __init__(self, path: Path, parts: Mapping[str, Array], labels: Tensor, shape: tuple[int, ...]):
        self.path, self._parts, self.labels = path, dict(parts), labels
        for key, array in parts.items():
            if array.shape[1:] != shape or array.shape[0] != len(labels):
                raise InputError(f"{path} has {key} of shape {list(array.shape)}: expected {[len(labels), *shape]}")
            if not array.dtype.is_floating_point:
                raise InputError(f"{path}: {key}: expected floats, got {array.dtype}")

    @property
    def preprocessing(self) -> dict[str, Any]:
        return {"scale": "none: the VAE's scaling factor is not applied"}

    def read(self, index: int, keep: bool = False) -> dict[str, Tensor]:
        sample = {key: array.row(index).to(torch.float32) for key, array in self._parts.items()}
        for key, value in sample.items():
            if not bool(value.isfinite().all()):
                raise InputError(f"{self.name(index)} has inf or NaN in {key}")
            if key == "latent_std" and float(value.min()) < 0:
                raise InputError(f"{self.name(index)} has a negative latent_std: give deviations, not log-variances")
        return sample
