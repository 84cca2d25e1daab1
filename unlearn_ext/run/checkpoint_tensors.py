"""The tensors of a checkpoint: of one process as three safetensors files, of several through torch.distributed.

Keys are ``model.<name>``, ``optimizer.<index>.<entry>``, ``ema.<name>``, ``teacher.<name>`` and ``extra.<number>``.
Either kind is read by any number of ranks; both are safetensors, without pickles.
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

from ..distributed.ranks import Ranks
from ..distributed.shards import is_sharded
from ..errors import InputError, WriteError, first_line
from ..utils.files import writing
from ..utils.reading import explain_open_errors

__all__ = ["StoredTensors", "described", "open_tensors", "write_tensors"]

_SHARDED = "tensors"  # the directory of a checkpoint of several ranks
_PARTS = ("model", "optimizer", "ema", "teacher", "extra")

Form = tuple[tuple[int, ...], torch.dtype]
Damaged = Callable[[str], InputError]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Writes into the directory ``path``, which all ranks see; each of them has to call it."""
    if ranks.size > 1:
        from torch.distributed import checkpoint

        writer = checkpoint.HuggingFaceStorageWriter(str(path / _SHARDED), save_distributed=True)
        own = {name: t.detach() if is_sharded(t) else t.detach().contiguous() for name, t in tensors.items()}
        try:
            with _quiet():
                checkpoint.save(own, storage_writer=writer, process_group=ranks.group)
        except checkpoint.CheckpointException as error:  # no Exception, so that nothing else would tell of it
            raise WriteError(f"{path.parent}: a checkpoint cannot be written ({first_line(error)})") from None
        return
    from safetensors.torch import save_file

    for part in _PARTS:
        found = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
        if found or part in ("model", "optimizer"):
            if part in ("model", "teacher", "extra"):  # parts of it may share memory, which safetensors refuse
                found = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in found.items()}
            with writing(path / f"{part}.safetensors"):
                save_file({name: t.detach().contiguous() for name, t in found.items()}, path / f"{part}.safetensors")


def described(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Shapes by key, for JSON: a file that is gone takes all that it held of a tensor with it."""
    return {key: list(tensor.shape) for key, tensor in tensors.items()}


def open_tensors(
    path: Path, shapes: Mapping[str, Any], parts: list[str], damaged: Damaged, ranks: Ranks
) -> StoredTensors:
    """Those of a checkpoint. What is damaged is an error here, as far as it can be known.

    Args:
        shapes: what :func:`described` gave of them.
        parts: the first words of its keys.
        damaged: makes the error of what is wrong.
    """
    if (path / _SHARDED).is_dir():
        return _Sharded(path / _SHARDED, shapes, damaged, ranks)
    return _Whole(path, parts, damaged)


class StoredTensors(ABC):
    """What a checkpoint has, by key."""

    forms: Mapping[str, Form]

    def part(self, name: str) -> dict[str, Form]:
        """Shapes and dtypes of ``model``, ``optimizer``, ``ema``, ``teacher`` or ``extra``, without that prefix."""
        return {key.removeprefix(f"{name}."): form for key, form in self.forms.items() if key.startswith(f"{name}.")}

    @abstractmethod
    def load(self, likes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by key: each whole, or on the device and cut over the ranks as that in ``likes`` is."""


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
                with explain_open_errors(file):
                    self._tensors |= {f"{part}.{name}": tensor for name, tensor in load_file(file).items()}
            except (OSError, SafetensorError):
                raise damaged(f"its {file.name} cannot be read") from None
        self.forms = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in self._tensors.items()}

    def load(self, likes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: self._tensors[key] for key in likes}


class _Sharded(StoredTensors):
    """The files of several ranks, of which each reads what it needs."""

    def __init__(self, path: Path, shapes: Mapping[str, Any], damaged: Damaged, ranks: Ranks):
        self._path, self._damaged, self._ranks = path, damaged, ranks
        if missing := self._missing(shapes):
            raise damaged(f"{missing} or a part of it is missing")

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

    def _missing(self, shapes: Mapping[str, Any]) -> str | None:
        """The first tensor that the files do not hold whole."""
        entries = self._metadata.state_dict_metadata
        for key, shape in shapes.items():
            pieces = sum(torch.Size(chunk.sizes).numel() for chunk in entries[key].chunks) if key in entries else -1
            if pieces != torch.Size(shape).numel():
                return key
        return None

    @torch.no_grad()
    def load(self, likes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from torch.distributed import checkpoint

        found: dict[str, Tensor] = {}
        for key, like in likes.items():
            found[key] = torch.empty_like(like, dtype=self.forms[key][1], memory_format=torch.contiguous_format)
        reader = checkpoint.HuggingFaceStorageReader(str(self._path))
        try:
            with _quiet():
                checkpoint.load(
                    found, storage_reader=reader, process_group=self._ranks.group, no_dist=self._ranks.size == 1
                )
        except checkpoint.CheckpointException as error:
            raise self._damaged(f"its tensors cannot be read ({first_line(error)})") from None
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
