"""Arrays in .npz and safetensors files; what a file says of itself is compared with its size before it is read."""

from __future__ import annotations

import io
import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, first_line
from ..utils.reading import explain_open_errors

__all__ = ["Array", "read_arrays"]

_KEYS = ("images", "latents", "latent_mean", "latent_std", "labels")
_LONGEST_HEADER = 1 << 14  # bytes of an array's header; numpy itself reads no longer ones
_DEFLATED_AT_MOST = 1032  # times smaller is a deflated stream than what it holds
_DTYPES = {  # of safetensors
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class Array(Protocol):
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int  # in memory

    def row(self, index: int) -> Tensor: ...

    def all(self) -> Tensor: ...


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of a data set, by name; their values are read when they are asked for.

    Raises:
        InputError: the file is of another kind or damaged, or its arrays are not of plain numbers.
    """
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".safetensors"):
        raise InputError(f"{path}: expected a folder with one folder per class, a .npz or a .safetensors file")
    return _npz_arrays(path) if suffix == ".npz" else _safetensors_arrays(path)


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
        name = str(self._open().get_dtype())
        if name not in _DTYPES:
            raise InputError(f"{path}: {key} has the dtype {name}: save integers or floating-point numbers")
        self.dtype = _DTYPES[name]

    def _open(self) -> Any:
        if self._slice is None:
            from safetensors import safe_open

            with explain_open_errors(self._path):
                self._slice = safe_open(self._path, framework="pt").get_slice(self._key)
        return self._slice

    def row(self, index: int) -> Tensor:
        return self._open()[index : index + 1][0].clone()

    def all(self) -> Tensor:
        return self._open()[...].clone()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slice": None}


def _safetensors_arrays(path: Path) -> dict[str, Array]:
    from safetensors import SafetensorError, safe_open

    try:
        with explain_open_errors(path), safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key in _KEYS]  # noqa: SIM118 - not a dict
        return {key: _SafetensorsArray(path, key) for key in keys}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a safetensors file ({first_line(error)})") from None


def _npz_arrays(path: Path) -> dict[str, Array]:
    """Members of an archive; those stored without compression (as np.savez does) are mapped, not read."""
    arrays: dict[str, Array] = {}
    try:
        with explain_open_errors(path), zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                key = info.filename.removesuffix(".npy")
                if key in _KEYS:
                    array = _member(path, archive, info, key)
                    native = array.dtype.newbyteorder("=")
                    arrays[key] = _NumpyArray(array if array.dtype == native else array.astype(native))
    except InputError:
        raise
    except (OSError, ValueError, LookupError, EOFError, TypeError, OverflowError, MemoryError) as error:
        raise _not_whole(path, error) from None
    except (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, tokenize.TokenError) as error:
        raise _not_whole(path, error) from None
    return arrays


def _not_whole(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is not a whole .npz file ({first_line(error)})")


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, key: str) -> np.ndarray:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"its {key} is compressed in a way that numpy does not write")
    with archive.open(info) as member:
        shape, fortran, dtype, start = _header(member)
        if dtype.hasobject:
            raise InputError(f"{path}: {key} holds pickled objects, which may run code: save plain numbers")
        if dtype.kind not in "uif":
            raise InputError(f"{path}: {key} has the dtype {dtype}: save plain numbers")
        if any(length < 0 for length in shape):
            raise ValueError(f"its {key} has the shape {list(shape)}")
        size = start + math.prod(shape) * dtype.itemsize
        if size != info.file_size:
            raise ValueError(f"its {key} should have {size:,} bytes and has {info.file_size:,}")
        if info.compress_type == zipfile.ZIP_STORED and 0 not in shape:
            offset = _data_offset(path, info) + start
            return np.memmap(path, dtype, "r", offset, shape, order="F" if fortran else "C")
        if size > start + _DEFLATED_AT_MOST * path.stat().st_size:
            raise ValueError(f"its {key} should have {size:,} bytes, more than the file can hold")
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether in Fortran's order, dtype, and the length of the header."""
    file = io.BytesIO(member.read(_LONGEST_HEADER))  # numpy would read as much as the header says it is long
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"arrays of format {version[0]}.{version[1]}, and 1.0 and 2.0 are read")
    return *readers[version](file), file.tell()


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: after its local header, which is not as long as the directory's."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        name, extra = struct.unpack("<HH", file.read(30)[26:])
    return info.header_offset + 30 + name + extra
