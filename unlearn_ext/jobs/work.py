"""The work folder of a run: latents of its images, checkpoints and Fisher sums, which nobody should publish.

It stands beside the output folder, ``forgotten.work`` beside ``forgotten``, and is removed when the result is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

from ..errors import InputError
from ..run.checkpoint_folder import numbered
from ..run.lock import refuse_held
from ..utils.files import writable_directory, write_json
from ..utils.leftovers import is_leftover

__all__ = ["WorkFolder", "size_of"]

_MARK, _FORMAT = "work.json", "unlearn_ext.work.1"
_CONTENTS = re.compile(r"latents|checkpoint-\d+(-damaged-\d+)?|history(-\d+)?\.jsonl|\.DS_Store", re.ASCII)


class WorkFolder:
    """Where a run keeps what only itself needs.

    Args:
        output: the run's output folder.
        folder: the work folder, where it is not to be beside ``output``.

    Attributes:
        path: the folder; links are followed, so that it lies on the disk of the output folder.
        latents: the folder in it for latents of the run's images.
    """

    def __init__(self, output: Path, folder: Path | None = None):
        self.output = Path(os.path.realpath(output))
        beside = Path(f"{self.output}.work")  # / has no name
        self.path = beside if folder is None else Path(os.path.realpath(folder))
        self.latents = self.path / "latents"
        self._made = False

    @property
    def checkpoints(self) -> list[Path]:
        return numbered(self.path)

    def check(self, source: Path, *, resume: bool) -> None:
        """Whether a run may use it; nothing is written.

        Raises:
            InputError: it lies in the output folder or in the model's, is somebody else's, or holds checkpoints and the
                run does not resume.
        """
        path, parents = self.path, self.path.parents
        if path == self.output or self.output in parents or path in self.output.parents:
            raise InputError(
                f"--work-dir: {path} and --output-dir lie in each other, and the output may be published: choose a "
                "folder outside it"
            )
        if Path(os.path.realpath(source)) in (path, *parents):
            raise InputError(f"--work-dir: {path} lies in the model's folder: choose another")
        try:
            entries = [] if not os.path.lexists(path) else [p.name for p in path.iterdir() if not is_leftover(p)]
        except OSError as error:
            raise InputError(f"--work-dir: {path} cannot be read ({error.strerror}): choose another") from None
        output = self._output()
        if entries and output is None:
            raise InputError(
                f"--work-dir: {path} holds {min(entries)} and is no work folder of a run: move it away, or name "
                "another folder with --work-dir"
            )
        if not resume and output not in (None, str(self.output)):
            refuse_held(path)
            raise InputError(
                f"--work-dir: {path} belongs to the run of {output}: wait until it has ended, or name another folder; "
                "one that was killed goes on with its own --output-dir, or remove the folder"
            )
        if self.checkpoints and not resume:
            refuse_held(path)  # or the advice would be to remove what a run is writing
            raise InputError(
                f"{path} holds checkpoints of an earlier run: add --resume-from-checkpoint latest, or remove that "
                "folder to start anew"
            )

    def _output(self) -> str | None:
        """The output folder of the run that the folder belongs to; None where it is no work folder."""
        try:
            mark = json.loads((self.path / _MARK).read_text(encoding="utf-8"))
            return str(mark["output_dir"]) if mark["format"] == _FORMAT else None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def _is_own(self) -> bool:
        return self._output() == str(self.output)

    def claim(self) -> None:
        """Makes the folder and marks it as this run's; one that goes on from another's takes it over."""
        self._made = not self.path.exists()
        writable_directory(self.path)
        if not self._is_own():
            refuse_held(self.path)
            write_json(self.path / _MARK, {"format": _FORMAT, "output_dir": str(self.output)})

    def held(self) -> dict[str, int]:
        """Bytes of what an earlier, unfinished run left and this one uses: what -> bytes."""
        return {"latents": size_of(self.latents), "checkpoints": sum(map(size_of, self.checkpoints))}

    def discard(self) -> None:
        """Removes the folder if this run made it: of a run that failed before it trained."""
        if self._made:
            self.clear()

    def clear(self) -> None:
        """Removes what the run of this output folder put there, and the folder unless something else is in it."""
        if not self._is_own():
            return
        for path in self.path.iterdir():
            if not (_CONTENTS.fullmatch(path.name) or is_leftover(path)):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        (self.path / _MARK).unlink(missing_ok=True)  # last: a kill before leaves a folder that is still known
        with contextlib.suppress(OSError):  # something else is left
            self.path.rmdir()

    def how_to_go_on(self) -> str:
        """What to do after a run was ended before its result was whole."""
        if self.checkpoints:
            return f"the same command with --resume-from-checkpoint latest goes on; its checkpoints are in {self.path}"
        return "there is no checkpoint (--checkpointing-steps N writes some); the same command starts anew"


def size_of(folder: Path) -> int:
    """Bytes of the files in it; 0 where there is no such folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
