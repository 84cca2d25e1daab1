"""The output folder of a run: claimed before it, filled at its end, and whole or mendable in between."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .._checkpoint_folder import numbered
from .._files import writable_directory, writing
from .._leftovers import is_leftover, partial_pattern, sweep
from ..errors import InputError
from .pretrained import OWN_FOLDER, Pretrained, write_result

__all__ = ["RESULT", "check_claim", "claim_output", "is_in_result", "move_output", "write_output"]

RESULT = "result.json"  # in OWN_FOLDER

_WHOLE = "folder"  # in OWN_FOLDER: a whole result, or what of it has not been moved to its place yet


def check_claim(output: Path, source: Path, *, resume: bool) -> None:
    """Whether a run may take the folder; nothing is written.

    Args:
        source: the folder of the model that is read.
        resume: whether the run goes on from a checkpoint.

    Raises:
        InputError: it lies in the source, or holds anything else than an unfinished run, or one to be resumed.
    """
    if source.resolve() in (output.resolve(), *output.resolve().parents):
        raise InputError(f"--output-dir: {output} lies in the model's own folder: choose another")
    own = output / OWN_FOLDER
    try:
        if not output.exists() or (own / _WHOLE).exists():  # the latter is moved to its place first
            return
        others = sorted(path.name for path in output.iterdir() if path.name != OWN_FOLDER and not is_leftover(path))
    except OSError as error:
        raise InputError(f"--output-dir: {output} cannot be read ({error.strerror}): choose another") from None
    if others:
        raise InputError(f"--output-dir: {output} holds {others[0]} already: choose an empty folder")
    if not resume and numbered(own):
        raise InputError(
            f"--output-dir: {output} holds checkpoints of an earlier run: add --resume-from-checkpoint latest, or "
            "choose an empty folder"
        )


def claim_output(output: Path, source: Path, needed: Mapping[str, int], *, resume: bool) -> Path:
    """Makes the folder, and removes what an earlier run of it was writing when it was killed.

    A result that was whole and not moved to its place yet is not removed: it is moved.

    Args:
        source: the folder of the model that is read.
        needed: bytes that the run will write, by part; ``latents`` and ``checkpoints`` that are there count.
        resume: whether the run goes on from a checkpoint.

    Raises:
        InputError: :func:`check_claim` refuses it, its disk is too full, or it has just become an earlier run's result.
    """
    check_claim(output, source, resume=resume)
    output = writable_directory(output)
    own = output / OWN_FOLDER
    if (own / _WHOLE).exists():
        _move(own / _WHOLE, output)
        lacks = "" if (own / RESULT).exists() else ", but has no result.json and pictures"
        raise InputError(
            f"--output-dir: {output} was an earlier run's, cut off at its very end, and its model is whole now{lacks}: "
            "use it, or choose an empty folder to run again"
        )
    unfinished = [*own.glob(f".{_WHOLE}-*"), *own.glob(f"{partial_pattern(_WHOLE)}")]
    there = {"latents": _size(own / "latents"), "checkpoints": sum(map(_size, numbered(own)))}
    missing = sum(max(0, size - there.get(part, 0)) for part, size in needed.items())
    free = shutil.disk_usage(output).free + sum(map(_size, unfinished))
    if free < missing:
        raise InputError(
            f"--output-dir: {output} has {free / 1e9:.1f} GB free, and the run writes {missing / 1e9:.1f} GB: choose "
            "another disk"
        )
    for left in unfinished:
        shutil.rmtree(left, ignore_errors=True)
    for folder in (output, own, own / "latents"):
        sweep(folder, held=True)
    return output


def write_output(pretrained: Pretrained, output: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Makes the whole folder, which :func:`move_output` moves to its place.

    Args:
        weights: the denoiser's, by name, where it holds but a part of them.
    """
    write_result(pretrained.folder, pretrained, output / OWN_FOLDER / _WHOLE, weights=weights)


def move_output(output: Path) -> None:
    """Moves what :func:`write_output` has made to its place, entry by entry, the index last."""
    with writing(output):
        _move(output / OWN_FOLDER / _WHOLE, output)


def is_in_result(output: Path, name: str) -> bool:
    """Whether the folder that :func:`write_output` has made holds a file."""
    return (output / OWN_FOLDER / _WHOLE / name).exists()


def _move(whole: Path, output: Path) -> None:
    """What is left of ``whole``: a run that is killed here is finished by the next. Nothing is overwritten."""
    entries = sorted(whole.iterdir(), key=lambda path: path.name == "model_index.json")
    for path in entries:
        if os.path.lexists(output / path.name):
            raise InputError(
                f"--output-dir: {output} holds {path.name}, where the result in {whole} is to go: move yours away and "
                "run again"
            )
    for path in entries:
        os.replace(path, output / path.name)
    whole.rmdir()


def _size(folder: Path) -> int:
    """Bytes of the files in it; 0 where there is no such folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
