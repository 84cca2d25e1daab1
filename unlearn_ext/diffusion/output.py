"""The output folder of a run: claimed before it, filled at its end, and whole or mendable in between."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .._files import atomic_path, writable_directory
from ..errors import InputError
from .pretrained import OWN_FOLDER, Pretrained, write_result

__all__ = ["claim_output", "write_output"]

_MOVING = "moving.json"  # in OWN_FOLDER, while entries are moved: their names


def claim_output(output: Path, source: Path, needed: Mapping[str, int]) -> Path:
    """Makes the folder, and removes what an earlier run of it was writing when it was killed.

    Args:
        source: the folder of the model that is read.
        needed: bytes that the run will write, by part; ``latents`` and ``checkpoints`` that are there count.

    Raises:
        InputError: it lies in the source, holds anything else than an unfinished run, or its disk is too full.
    """
    if source.resolve() in (output.resolve(), *output.resolve().parents):
        raise InputError(f"--output-dir: {output} lies in the model's own folder: choose another")
    output = writable_directory(output)
    for left in output.glob(".folder-*"):
        shutil.rmtree(left, ignore_errors=True)
    _undo_move(output)
    others = [path.name for path in output.iterdir() if path.name != OWN_FOLDER]
    if others:
        raise InputError(f"--output-dir: {output} holds {sorted(others)[0]} already: choose an empty folder")
    own = output / OWN_FOLDER
    there = {"latents": _size(own / "latents"), "checkpoints": sum(map(_size, own.glob("checkpoint-*")))}
    missing = sum(max(0, size - there.get(part, 0)) for part, size in needed.items())
    free = shutil.disk_usage(output).free
    if free < missing:
        raise InputError(
            f"--output-dir: {output} has {free / 1e9:.1f} GB free, and the run writes {missing / 1e9:.1f} GB: choose "
            "another disk"
        )
    return output


def write_output(pretrained: Pretrained, output: Path) -> None:
    """The whole folder is made first, and moved in entry by entry, the index last."""
    moving = output / OWN_FOLDER / _MOVING
    partial = Path(tempfile.mkdtemp(prefix=".folder-", dir=output))
    try:
        write_result(pretrained.folder, pretrained, partial / "folder")
        entries = sorted((partial / "folder").iterdir(), key=lambda path: path.name == "model_index.json")
        with atomic_path(moving) as file:  # so that the next run knows what it may remove, if this one is killed
            file.write_text(json.dumps([path.name for path in entries]))
        for path in entries:
            os.replace(path, output / path.name)
        moving.unlink()
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _undo_move(output: Path) -> None:
    moving = output / OWN_FOLDER / _MOVING
    if not moving.exists():
        return
    names = set(json.loads(moving.read_text())) - {OWN_FOLDER}
    for path in [path for path in output.iterdir() if path.name in names]:  # nothing outside, whatever the file says
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    moving.unlink()


def _size(folder: Path) -> int:
    """Bytes of the files in it; 0 where there is no such folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
