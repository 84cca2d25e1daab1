"""The tensors of a checkpoint: of one process as three safetensors files, of several through torch.distributed.

Keys are ``model.<name>``, ``optimizer.<index>.<entry>`` and ``ema.<name>``. Either kind is read by any number of ranks;
both are safetensors, without pickles.
"""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._ranks import Ranks
from ._shards import local, part_like
from .errors import InputError

__all__ = ["StoredTensors", "open_tensors", "write_tensors"]

_SHARDED = "tensors"  # the directory of a checkpoint of several ranks
_PARTS = ("model", "optimizer", "ema")

Form = tuple[tuple[int, ...], torch.dtype]
Damaged = Callable[[str], InputError]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Writes into the directory ``path``, which all ranks see; each of them has to call it."""
    if ranks.size > 1:
        from torch.distributed import checkpoint

        with _quiet():
            checkpoint.save(
                {name: tensor.detach() for name, tensor in tensors.items()},
                storage_writer=checkpoint.HuggingFaceStorageWriter(str(path / _SHARDED), save_distributed=True),
                process_group=ranks.group,
            )
        return
    from safetensors.torch import save_file

    for part in _PARTS:
        found = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
        if found or part != "ema":
            copies = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in found.items()}
            save_file(copies, path / f"{part}.safetensors")


def open_tensors(path: Path, averaged: bool, damaged: Damaged, ranks: Ranks) -> StoredTensors:
    """Those of a checkpoint. What is damaged is an error here, as far as it can be known.

    Args:
        averaged: whether it has moving averages.
        damaged: makes the error of what is wrong.
    """
    if (path / _SHARDED).is_dir():
        return _Sharded(path / _SHARDED, damaged, ranks)
    return _Whole(path, [part for part in _PARTS if averaged or part != "ema"], damaged)


class StoredTensors(ABC):
    """What a checkpoint has, by key."""

    forms: Mapping[str, Form]

    def part(self, name: str) -> dict[str, Form]:
        """Shapes and dtypes of ``model``, ``optimizer`` or ``ema``, without that prefix."""
        return {key.removeprefix(f"{name}."): form for key, form in self.forms.items() if key.startswith(f"{name}.")}

    @abstractmethod
    def load(self, likes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by key, in memory of their own, each on the device and cut over the ranks as that in ``likes`` is."""


class _Whole(StoredTensors):
    """The files of one process, read at once."""

    def __init__(self, path: Path, parts: list[str], damaged: Damaged):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        self._tensors: dict[str, Tensor] = {}
        for part in parts:
            file = path / f"{part}.safetensors"
            if not file.is_file():
                raise damaged(f"{file.name} is missing")
            try:
                self._tensors |= {f"{part}.{name}": tensor for name, tensor in load_file(file).items()}
            except (OSError, SafetensorError):
                raise damaged(f"its {file.name} cannot be read") from None
        self.forms = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in self._tensors.items()}

    @torch.no_grad()
    def load(self, likes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for key, like in likes.items():
            found[key] = torch.empty_like(like, dtype=self._tensors[key].dtype)
            local(found[key]).copy_(part_like(self._tensors[key], like))
        return found


class _Sharded(StoredTensors):
    """The files of several ranks, of which each reads what it needs."""

    def __init__(self, path: Path, damaged: Damaged, ranks: Ranks):
        self._path, self._damaged, self._ranks = path, damaged, ranks
        if missing := self._missing():
            raise damaged(missing)

    @cached_property
    def _metadata(self) -> Any:
        from safetensors import SafetensorError
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        try:
            return HuggingFaceStorageReader(str(self._path)).read_metadata()
        except (OSError, SafetensorError, ValueError, KeyError):
            raise self._damaged(f"a file in {self._path.name} cannot be read") from None

    @cached_property
    def forms(self) -> Mapping[str, Form]:
        entries = self._metadata.state_dict_metadata.items()
        return {key: (tuple(entry.size), entry.properties.dtype) for key, entry in entries}

    def _missing(self) -> str | None:
        """Of the pieces of every tensor, those that were in a file that is gone leave a hole."""
        for key, entry in self._metadata.state_dict_metadata.items():
            pieces = sum(torch.Size(chunk.sizes).numel() for chunk in entry.chunks)
            if pieces != torch.Size(entry.size).numel():
                return f"a part of {key} is missing"
        return None

    @torch.no_grad()
    def load(self, likes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from torch.distributed import checkpoint

        found: dict[str, Tensor] = {}
        for key, like in likes.items():
            found[key] = torch.empty_like(like, dtype=self.forms[key][1], memory_format=torch.contiguous_format)
        with _quiet():
            checkpoint.load(
                found,
                storage_reader=checkpoint.HuggingFaceStorageReader(str(self._path)),
                process_group=self._ranks.group,
                no_dist=self._ranks.size == 1,
            )
        return found


class _quiet:
    """Without the library's remark that there is one process, which is known."""

    def __enter__(self):
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        self._logger = logging.getLogger("torch.distributed.checkpoint")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *error):
        self._logger.setLevel(self._level)
        self._warnings.__exit__(*error)
