"""Images or latents with labels in .npz and safetensors files, read row by row."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ._source import HASHED_BYTES, as_pixels, known_classes

__all__ = ["array_labels", "open_arrays", "read_arrays"]

_KEYS = ("images", "latents", "latent_mean", "latent_std", "labels")
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
    found = [key for key in _KINDS if key in arrays]
    if len(found) != 1:
        got = f"it holds {' and '.join(found)}" if found else "it holds none of them"
        raise InputError(f"{path}: expected one of images, latents, or latent_mean with latent_std; {got}")
    if ("latent_mean" in arrays) != ("latent_std" in arrays):
        raise InputError(f"{path}: latent_mean needs latent_std beside it")
    labels, main = array_labels(path, arrays), arrays[found[0]]
    if not main.shape or main.shape[0] == 0:
        raise InputError(f"{path} has no samples")
    if labels.shape[0] != main.shape[0]:
        raise InputError(f"{path} has {main.shape[0]} samples and {labels.shape[0]} labels: they must pair up")
    values = labels.all().to(torch.int64)
    for label in (int(values.min()), int(values.max())):
        if label < 0 or (classes is not None and label >= classes):
            limits = "labels are counted from 0" if classes is None else known_classes(classes)
            raise InputError(f"{path} has the label {label}: {limits}")
    if found[0] == "images":
        if size is None or channels is None:
            raise InputError(f"{path} holds images, and the model takes latents only: give it latents, or a VAE")
        source: ArrayFile = _Images(path, main, values, size, channels)
    else:
        if latent_size is None or latent_channels is None:
            raise InputError(f"{path} holds latents, and the model takes images: give it images")
        parts = {key: arrays[key] for key in ("latents", "latent_mean", "latent_std") if key in arrays}
        source = _Latents(path, parts, values, (latent_channels, *latent_size))
    return source, _KINDS[found[0]]


def read_arrays(path: Path) -> dict[str, _Array]:
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".safetensors"):
        raise InputError(f"{path}: expected a folder with one folder per class, a .npz or a .safetensors file")
    return _npz_arrays(path) if suffix == ".npz" else _safetensors_arrays(path)


def array_labels(path: Path, arrays: Mapping[str, _Array]) -> _Array:
    if "labels" not in arrays:
        raise InputError(f"{path} has no labels: add an array of integers, one for each sample")
    labels = arrays["labels"]
    if labels.dtype.is_floating_point or len(labels.shape) != 1:
        raise InputError(f"{path}: labels: expected integers of shape [N], got {labels.dtype} {list(labels.shape)}")
    return labels


class _Array(Protocol):
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int  # in memory

    def row(self, index: int) -> Tensor: ...

    def all(self) -> Tensor: ...


class _NumpyArray:
    def __init__(self, array: np.ndarray):
        self._array = array
        self.shape = tuple(array.shape)
        self.dtype = torch.from_numpy(np.zeros(1, array.dtype)).dtype
        self.nbytes = array.nbytes if getattr(array, "filename", None) is None else 0  # else it is mapped

    def row(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self._array[index]))

    def all(self) -> Tensor:
        return torch.from_numpy(np.array(self._array))


class _SafetensorsArray:
    nbytes = 0

    def __init__(self, path: Path, key: str):
        self._path, self._key, self._slice = path, key, None
        self.shape = tuple(self._open().get_shape())
        empty = self._open()[:0] if self.shape else self.all()
        self.dtype = empty.dtype

    def _open(self) -> Any:
        if self._slice is None:
            from safetensors import safe_open

            self._slice = safe_open(self._path, framework="pt").get_slice(self._key)
        return self._slice

    def row(self, index: int) -> Tensor:
        return self._open()[index : index + 1][0].clone()

    def all(self) -> Tensor:
        return self._open()[...].clone()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slice": None}


def _npz_arrays(path: Path) -> dict[str, _Array]:
    """Members of an archive; those stored without compression (as np.savez does) are mapped, not read."""
    arrays: dict[str, _Array] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                key = info.filename.removesuffix(".npy")
                if key not in _KEYS:
                    continue
                with archive.open(info) as member:
                    version = np.lib.format.read_magic(member)
                    read_header = {
                        (1, 0): np.lib.format.read_array_header_1_0,
                        (2, 0): np.lib.format.read_array_header_2_0,
                    }[version]
                    shape, fortran, dtype = read_header(member)
                    start = member.tell()
                    if dtype.hasobject:
                        raise InputError(f"{path}: {key} holds pickled objects, which may run code: save plain numbers")
                    if dtype.kind not in "uif":
                        raise InputError(f"{path}: {key} has the dtype {dtype}: save plain numbers")
                    if info.compress_type != zipfile.ZIP_STORED or 0 in shape:
                        member.seek(0)
                        array = np.lib.format.read_array(member, allow_pickle=False)
                    else:
                        offset = _data_offset(path, info) + start
                        array = np.memmap(path, dtype, "r", offset, shape, order="F" if fortran else "C")
                native = array.dtype.newbyteorder("=")
                arrays[key] = _NumpyArray(array if array.dtype == native else array.astype(native))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(f"{path} is not a whole .npz file ({error})") from None
    return arrays


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: after its local header, which is not as long as the directory's."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        name, extra = struct.unpack("<HH", file.read(30)[26:])
    return info.header_offset + 30 + name + extra


def _safetensors_arrays(path: Path) -> dict[str, _Array]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key in _KEYS]  # noqa: SIM118 - not a dict
        return {key: _SafetensorsArray(path, key) for key in keys}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a safetensors file ({error})") from None


class ArrayFile:
    path: Path
    labels: Tensor
    _parts: dict[str, _Array]

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
    def __init__(self, path: Path, array: _Array, labels: Tensor, size: tuple[int, int], channels: int):
        self.path, self._array, self.labels = path, array, labels
        self._parts = {"images": array}
        shape = array.shape[1:]
        wanted = {"chw": (channels, *size), "hwc": (*size, channels)}
        if channels == 1:
            wanted["hw"] = size
        self._order = next((order for order, expected in wanted.items() if shape == expected), None)
        if self._order is None:
            raise InputError(
                f"{path} has images of shape {list(shape)}, and the model takes {list(wanted['chw'])} or "
                f"{list(wanted['hwc'])}: resize them, or give pictures in class folders, which are resized"
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
    def __init__(self, path: Path, parts: Mapping[str, _Array], labels: Tensor, shape: tuple[int, ...]):
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
