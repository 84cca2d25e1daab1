"""The history of a run, in memory and as one JSON object per line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from ._files import atomic_path
from ._plain import plain

__all__ = ["History"]


class History:
    """Appends to ``entries`` and, with a directory, to ``history.jsonl`` in it."""

    def __init__(self, directory: Path | None, entries: list[dict[str, Any]]):
        self.entries = entries
        self.file = None if directory is None else directory / "history.jsonl"

    def begin(self) -> None:
        """Moves an earlier run's file aside, to the first name of ``history-1.jsonl`` and so on that is free."""
        if self.file is not None and self.file.exists():
            numbered = (self.file.with_name(f"history-{number}.jsonl") for number in itertools.count(1))
            self.file.rename(next(path for path in numbered if not path.exists()))

    def keep_until(self, iteration: int) -> None:
        """Reads the file back and drops what a killed run logged after the checkpoint it resumes from."""
        if self.file is None or not self.file.is_file():
            return
        for line in self.file.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                break  # the line that the killed run was writing
            if entry["iteration"] < iteration:
                self.entries.append(entry)
        with atomic_path(self.file) as partial:
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries))

    def add(self, entry: dict[str, Any]) -> None:
        entry = plain(entry)
        self.entries.append(entry)
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps(entry) + "\n")
