"""Where the forget set's Fisher sums wait while those of the retain set are measured."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed.hashing import raw_bytes
from ..errors import InputError
from ..utils.arguments import check_choice
from ..utils.files import atomic_path
from ..utils.leftovers import partial_name

__all__ = ["STORAGES", "StoredSums", "check_storage", "stored"]

STORAGES = ("device", "host", "disk")
_FILE = "fisher-forget.safetensors"
_DTYPES = {torch.float32: "F32", torch.float64: "F64"}


class StoredSums(Mapping[str, Tensor]):
    """Fisher sums by parameter name; each comes back to its device when it is asked for, and is not kept there."""

    def __init__(self, names: list[str], device: torch.device, fetch: Callable[[str], Tensor]):
        self._names, self._device, self._fetch = names, device, fetch

    def __getitem__(self, name: str) -> Tensor:
        return self._fetch(name).to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def check_storage(name: str, storage: str, *, gamma: bool) -> None:
    """Whether it is one of :data:`STORAGES`, and the mask is made by ``gamma`` where its ratios come one by one."""
    check_choice(name, storage, STORAGES)
    if storage != "device" and not gamma:
        raise InputError(
            f"{name} {storage} makes a mask tensor by tensor, as gamma does; mask_fraction ranks the weights of all "
            "tensors at once, and a ready mask needs no Fisher: leave one of them out"
        )


@contextlib.contextmanager
def stored(sums: dict[str, Tensor], storage: str, directory: Path | None) -> Iterator[Mapping[str, Tensor]]:
    """Takes the tensors out of ``sums``, one by one, and gives them back by name within the block.

    Args:
        sums: is emptied, unless they stay on the ``device``.
        storage: ``device``, ``host`` (the CPU's memory) or ``disk`` (a safetensors file).
        directory: for the file, whose name is that of a leftover if the process is killed; removed after the block.

    Raises:
        InputError: the file cannot be written.
    """
    if storage == "device":
        yield sums
        return
    names, device = list(sums), next(iter(sums.values())).device
    if storage == "host":
        kept = {name: sums.pop(name).cpu() for name in names}
        yield StoredSums(names, device, kept.__getitem__)
        return
    if directory is None:
        raise InputError("Fisher storage disk: expected a directory for the file, got None")
    path = directory / partial_name(_FILE)
    likes = {name: torch.empty_like(total, device="meta") for name, total in sums.items()}
    try:
        with atomic_path(path) as partial:
            starts = _write(partial, sums)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): make room there, or set fisher_storage to host or "
            "device"
        ) from None
    try:
        with open(path, "rb", buffering=0) as file:
            yield StoredSums(names, device, lambda name: _read(file, starts[name], likes[name]))
    finally:
        path.unlink(missing_ok=True)


def _write(path: Path, sums: dict[str, Tensor]) -> dict[str, int]:
    """A safetensors file, one tensor after the other, and where each starts in it; safetensors' own writer wants all of
    them on the CPU at once."""
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, total in sums.items():
        start, end = end, end + total.numel() * total.element_size()
        header[name] = {"dtype": _DTYPES[total.dtype], "shape": list(total.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in list(sums):
            file.write(raw_bytes(sums.pop(name)))
    return {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in header.items()}


def _read(file: FileIO, start: int, like: Tensor) -> Tensor:
    """One tensor; safetensors' own reader maps the whole file."""
    found = torch.empty(like.shape, dtype=like.dtype, device="cpu")
    view = raw_bytes(found)
    file.seek(start)
    while len(view):
        count = file.readinto(view)
        if not count:
            raise InputError(f"{file.name} has become shorter than it was written: run again")
        view = view[count:]
    return found
