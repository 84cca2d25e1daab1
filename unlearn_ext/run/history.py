"""The history of a run, in memory and as one JSON object per line."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..utils.files import atomic_path, writing
from ..utils.plain import plain

__all__ = ["HISTORY", "History", "as_lines", "read_lines"]

HISTORY = "history.jsonl"


class History:
    """Appends to ``entries`` and, with a directory, to ``history.jsonl`` in it.

    Raises:
        WriteError: the disk is full, the folder is gone.
    """

    def __init__(self, directory: Path | None, entries: list[dict[str, Any]]):
        self.entries = entries
        self.file = None if directory is None else directory / HISTORY

    def begin(self) -> None:
        """Moves an earlier run's file aside, to the first name of ``history-1.jsonl`` and so on that is free."""
        if self.file is not None and os.path.lexists(self.file):
            numbered = (self.file.with_name(f"history-{number}.jsonl") for number in itertools.count(1))
            with writing(self.file):
                self.file.rename(next(path for path in numbered if not os.path.lexists(path)))

    def go_on(self, entries: list[dict[str, Any]], *, own: bool) -> None:
        """Starts from a checkpoint's entries: drops what a killed run logged after it, and moves another run's file
        aside.

        Args:
            own: whether the checkpoint lies in the folder of the file.
        """
        self.entries[:] = entries
        if self.file is None:
            return
        text = as_lines(entries)
        if os.path.lexists(self.file):
            if not self._is_of(entries, own):
                self.begin()
            elif self.file.read_bytes() == text.encode():
                return
        with atomic_path(self.file) as partial:
            partial.write_text(text, encoding="utf-8")

    def _is_of(self, entries: list[dict[str, Any]], own: bool) -> bool:
        """Whether the file is that of the run: the entries of the same iterations are the same. What a link leads to is
        somebody's else, and so is a file without one entry."""
        if self.file.is_symlink() or not self.file.is_file():
            return False
        expected = {entry["iteration"]: entry for entry in entries}
        there = read_lines(self.file)
        both = [entry for entry in there if entry["iteration"] in expected]
        if not there:
            return self.file.stat().st_size == 0
        return all(expected[entry["iteration"]] == entry for entry in both) and (own or bool(both))

    def add(self, entry: dict[str, Any]) -> None:
        entry = plain(entry)
        self.entries.append(entry)
        if self.file is not None:
            with writing(self.file), self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


def as_lines(entries: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Entries of a file; a line that is damaged is left out, and those behind it are not."""
    entries = []
    for line in file.read_bytes().split(b"\n"):
        try:
            entry = json.loads(line)
            if isinstance(entry["iteration"], int):
                entries.append(entry)
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return entries
