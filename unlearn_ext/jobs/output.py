"""The output folder of a run: claimed before it, filled at its end, and whole or mendable in between."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..models.pretrained import Pretrained
from ..models.written import OWN_FOLDER, foreign_entries, write_result
from ..utils.files import writable_directory, writing
from ..utils.leftovers import is_leftover, partial_pattern, sweep
from .work import size_of

__all__ = ["NOT_YET", "RESULT", "check_claim", "claim_output", "is_in_result", "is_waiting", "move_output"]
__all__ += ["recorded_verdict", "unfinished_bytes", "write_output"]

RESULT = "result.json"  # in OWN_FOLDER
NOT_YET = "not verified: the run was cut off before its pictures were judged"  # the verdict of an unfinished run
_UNFINISHED = (RESULT, "mask.safetensors", "history.jsonl", "before-after.png")  # what one leaves in OWN_FOLDER
_WHOLE = "folder"  # in OWN_FOLDER: a whole result, or what of it has not been moved to its place yet
# Options that another run of the same may have.
_MAY_DIFFER = ("resume_from_checkpoint", "output_dir", "work_dir", "keep_work", "checkpointing_steps", "device")
_MAY_DIFFER += ("checkpoints_total_limit", "parallel")
_PRIVATE = ("checkpoint-*", "latents")  # what must not stand in a folder that is published


def check_claim(output: Path, source: Path, *, resume: bool, options: Mapping[str, Any] | None = None) -> None:
    """Whether a run may take the folder; nothing is written.

    Args:
        source: the folder of the model that is read.
        resume: whether the run goes on from a checkpoint.
        options: the run's, as results hold them.

    Raises:
        InputError: it lies in the source, or holds anything else than what an unfinished run leaves.
    """
    entries, folder = foreign_entries(output, source), output / OWN_FOLDER
    if is_waiting(output):  # it is moved to its place first
        return
    others = [name for name in entries if name != OWN_FOLDER]
    private = sorted(path.name for pattern in _PRIVATE for path in folder.glob(pattern))
    if others and (folder / RESULT).exists():
        raise InputError(_finished(output, resume, options or {}))
    if others:
        raise InputError(f"--output-dir: {output} holds {others[0]} already: choose an empty folder")
    if private:
        raise InputError(
            f"--output-dir: {folder} holds {private[0]} of a run by an earlier version, which does not belong into a "
            "folder that may be published: remove it, or choose an empty folder"
        )
    try:
        records = sorted(path.name for path in folder.iterdir() if not is_leftover(path)) if folder.is_dir() else []
    except OSError as error:
        raise InputError(f"--output-dir: {folder} cannot be read ({error.strerror}): choose an empty folder") from None
    if RESULT in records and recorded_verdict(output) != NOT_YET:
        raise InputError(
            f"--output-dir: {folder} holds the result of a finished run whose model has gone: move it away, or choose "
            "an empty folder"
        )
    if further := [name for name in records if name not in _UNFINISHED]:
        raise InputError(
            f"--output-dir: {folder} holds {further[0]}, which no unfinished run leaves: move it away, or choose an "
            "empty folder"
        )


def recorded_verdict(output: Path) -> Any:
    """What the result in the folder says of the model; None where there is none, or it cannot be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return json.loads((output / OWN_FOLDER / RESULT).read_text(encoding="utf-8"))["verdict"]
    return None


def _finished(output: Path, resume: bool, options: Mapping[str, Any]) -> str:
    further = "to forget further, give it as --pretrained-model-name-or-path and another --output-dir"
    if not resume:
        return f"--output-dir: {output} holds a finished run already: choose an empty folder, or, {further}"
    finished, then = f"--resume-from-checkpoint: the run of {output} is finished", {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        then = dict(json.loads((output / OWN_FOLDER / RESULT).read_text(encoding="utf-8"))["options"])
    other = [name for name in options if name in then and name not in _MAY_DIFFER and options[name] != then[name]]
    for name in other:
        if name != "max_train_steps":
            before, now = (_option(name, value[name]) for value in (then, options))
            return f"{finished}, and it had {before} where this one has {now}: {further}"
    if not other:
        return f"{finished}, and its model is there: use it; or, {further}"
    return (
        f"{finished}, and another --max-train-steps would not continue it, because its batches and its schedule were "
        f"made for those it had: {further}"
    )


def _option(name: str, value: Any) -> str:
    option = f"--{name.replace('_', '-')}"
    return f"no {option}" if value in (None, False) else option if value is True else f"{option} {value}"


def claim_output(output: Path, source: Path, *, resume: bool) -> Path:
    """Makes the folder, and removes what an earlier run of it was writing when it was killed.

    Args:
        source: the folder of the model that is read.
        resume: whether the run goes on from a checkpoint.

    Raises:
        InputError: :func:`check_claim` refuses it.
    """
    check_claim(output, source, resume=resume)
    output = writable_directory(output)
    for left in _unfinished(output):
        shutil.rmtree(left, ignore_errors=True)
    for folder in (output, output / OWN_FOLDER):
        sweep(folder, held=True)
    return output


def is_waiting(output: Path) -> bool:
    """Whether an earlier run's result is whole there and was not moved to its place."""
    return (output / OWN_FOLDER / _WHOLE).exists()


def unfinished_bytes(output: Path) -> int:
    """Bytes of what an earlier run was writing when it was killed, and :func:`claim_output` removes."""
    return sum(map(size_of, _unfinished(output)))


def _unfinished(output: Path) -> list[Path]:
    return list((output / OWN_FOLDER).glob(partial_pattern(_WHOLE)))


def write_output(pretrained: Pretrained, output: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Makes the whole folder, which :func:`move_output` moves to its place.

    Args:
        weights: the denoiser's, by name, where it holds but a part of them.
    """
    write_result(pretrained.folder, pretrained, output / OWN_FOLDER / _WHOLE, weights=weights)


def move_output(output: Path) -> None:
    """Moves what :func:`write_output` has made to its place, entry by entry, the index last."""
    sweep(output / OWN_FOLDER, held=True)
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
