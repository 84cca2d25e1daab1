"""The folder that ``demo`` or ``compare`` writes: empty or marked as that command's, and one run's at a time."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["MARK", "check_output", "hold_output"]

MARK, _FORMAT = ".unlearn_ext.json", "unlearn_ext.output.1"


@contextlib.contextmanager
def hold_output(folder: Path, command: str) -> Iterator[None]:
    """Makes the folder, marks it as the command's, and keeps other runs out of it within the block.

    Files in a marked folder may be replaced.

    Raises:
        InputError: it holds something and is not marked, cannot be written to, or another run writes there.
    """
    from ..run.lock import hold
    from ..utils.files import writable_directory, write_json

    check_output(folder, command)
    with hold(writable_directory(folder)):
        _check(folder, command)  # again: another run may have just taken it
        write_json(folder / MARK, {"format": _FORMAT, "command": command})
        yield


def check_output(folder: Path, command: str) -> None:
    """Raises what :func:`hold_output` would of what is in the folder, before a command reads its data."""
    from ..run.lock import refuse_held

    _check(folder, command)
    refuse_held(folder)


def _check(folder: Path, command: str) -> None:
    from ..errors import InputError
    from ..utils.leftovers import is_leftover

    try:
        entries = sorted(path.name for path in folder.iterdir() if not is_leftover(path)) if folder.is_dir() else []
    except OSError as error:
        raise InputError(f"--output-dir: {folder} cannot be read ({error.strerror}): choose another folder") from None
    if entries and not _is_marked(folder, command):
        raise InputError(
            f"--output-dir: {folder} holds {entries[0]} and was not made by unlearn-ext {command}, which might replace "
            "files in it: choose an empty folder"
        )


def _is_marked(folder: Path, command: str) -> bool:
    if os.path.islink(folder / MARK):
        return False
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads((folder / MARK).read_text(encoding="utf-8")) == {"format": _FORMAT, "command": command}
    return False
