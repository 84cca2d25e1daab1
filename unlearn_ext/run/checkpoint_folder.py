"""Which checkpoints an output folder holds, and whose they are: the one test that everything else asks."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from pathlib import Path

from ..errors import InputError
from ..utils.files import user_path
from ..utils.reading import names_in
from ..utils.seal import label_of

__all__ = ["candidates", "check_folder", "is_checkpoint", "keep_newest", "make_room", "numbered", "runs_of"]

_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
STATE = "state.json"
_LABEL = "run "
_FORMATS = "unlearn_ext.checkpoint."


def numbered(directory: Path) -> list[Path]:
    """Everything called ``checkpoint-<n>``, whoever made it, by n."""
    found = [(int(match[1]), directory / name) for name in names_in(directory) if (match := _NAME.fullmatch(name))]
    return [path for _, path in sorted(found)]


def is_checkpoint(path: Path) -> bool:
    """Whether it is a checkpoint of this package, damaged or not; other programs have files of these names too."""
    if label_of(path) is not None:
        return True
    try:
        document = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError, RecursionError):  # it may be a damaged one
        return True
    return isinstance(document, dict) and str(document.get("format")).startswith(_FORMATS)


def runs_of(path: Path) -> set[str]:
    """The runs that a checkpoint names as its own; none where it is somebody else's, or too damaged to tell."""
    label = label_of(path) or ""
    runs = {label.removeprefix(_LABEL)} if label.startswith(_LABEL) else set()
    try:
        document = json.loads((path / STATE).read_text(encoding="utf-8"))
        if str(document["format"]).startswith(_FORMATS):
            runs.add(str(document["run"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return runs


def candidates(output_dir: Path | None, choice: str | Path) -> list[Path]:
    """What ``latest``, newest first, or a path may mean."""
    if isinstance(choice, bool):  # as transformers' Trainer takes it
        raise InputError(
            f"resume_from_checkpoint: expected 'latest' or a path, got {choice}: pass "
            + ("'latest'" if choice else "None to start anew")
        )
    if str(choice) != "latest":
        path = user_path(choice).absolute()
        if not is_checkpoint(path):
            raise InputError(f"there is no checkpoint at {path}")
        return [path]
    if output_dir is None:
        raise InputError("resume_from_checkpoint='latest' needs the output_dir that holds the checkpoints")
    found = [path for path in numbered(output_dir) if is_checkpoint(path)]
    if not found:
        raise InputError(f"there is no checkpoint in {output_dir} to resume from")
    return found[::-1]


def check_folder(directory: Path, run: str | None) -> None:
    """Whether a run may write its checkpoints there.

    Args:
        run: that goes on; None for a new one.

    Raises:
        InputError: there are checkpoints of another run, or folders of that name that somebody else has made.
    """
    for path in numbered(directory):
        runs = runs_of(path)
        if run in runs:
            continue
        if not is_checkpoint(path):
            raise InputError(
                f"{directory} holds {path.name}, which is no checkpoint of this package: move it away, or choose "
                "another directory"
            )
        if run is None:
            raise InputError(
                f"{directory} holds checkpoints of an earlier run: resume it (resume_from_checkpoint='latest') or "
                "choose another directory"
            )
        if runs:
            raise InputError(
                f"{directory} holds {path.name} of another run than the one that is resumed: choose another directory"
            )


def make_room(path: Path, run: str) -> None:
    """Moves aside what has a checkpoint's name and is not known to be the run's own, such as a damaged one."""
    if os.path.lexists(path) and run not in runs_of(path):
        names = (path.with_name(f"{path.name}-damaged-{number}") for number in itertools.count(1))
        path.rename(next(name for name in names if not os.path.lexists(name)))


def keep_newest(directory: Path, count: int, run: str, iteration: int) -> None:
    """Removes the run's checkpoints up to that of an iteration but for the last ``count`` of them. Later ones, of a run
    that went on from an earlier one, may be damaged, and do not count."""
    latest = directory / f"checkpoint-{iteration}"
    paths = [path for path in numbered(directory) if run in runs_of(path)]
    for path in paths[: paths.index(latest) + 1][:-count]:
        shutil.rmtree(path, ignore_errors=True)
