"""Whether disks and memory have room for a run."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, is_out_of_memory

__all__ = ["Need", "Room", "check_room", "explain_out_of_memory", "room_for"]

_SMALLER_BATCHES = "lower --train-batch-size, or add --gradient-checkpointing or --optimizer-in-backward"


@dataclass(frozen=True)
class Need:
    """Bytes that will be written below ``path``, which need not exist yet and is called ``name``."""

    name: str
    path: Path
    size: int


@dataclass(frozen=True)
class Room:
    """One disk: bytes that will be written to it, for what, and bytes that are free."""

    names: tuple[str, ...]
    paths: tuple[Path, ...]
    needed: int
    free: int


def room_for(needs: Iterable[Need]) -> list[Room]:
    """The needs by disk: what lies on the same one is added up."""
    by_disk: dict[int, list[Need]] = {}
    for need in needs:
        by_disk.setdefault(_disk_of(_existing(need.path)), []).append(need)
    return [
        Room(
            tuple(need.name for need in together),
            tuple(need.path for need in together),
            max(0, sum(need.size for need in together)),
            shutil.disk_usage(_existing(together[0].path)).free,
        )
        for together in by_disk.values()
    ]


def check_room(rooms: Iterable[Room]) -> None:
    """
    Raises:
        InputError: a disk has less free than the run needs.
    """
    for room in rooms:
        if room.free < room.needed:
            where = " and ".join(map(str, room.paths))
            raise InputError(
                f"the disk of {where} has {room.free / 1e9:.3g} GB free, and the run writes {room.needed / 1e9:.3g} GB "
                "to it: choose another disk with --output-dir and --work-dir"
            )


@contextlib.contextmanager
def explain_out_of_memory(device: str, what: str, advice: str = _SMALLER_BATCHES) -> Iterator[None]:
    """Turns a lack of memory within into an InputError.

    Args:
        what: what does not fit.
        advice: what to do.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"{what} does not fit in the memory of {device}: {advice}") from None


def _disk_of(path: Path) -> int:
    return os.stat(path).st_dev


def _existing(path: Path) -> Path:
    """The nearest folder above that exists."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
