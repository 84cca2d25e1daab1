"""One file for each finished run, whole or not there: what a killed comparison goes on from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..utils.files import atomic_path
from .keys import file_key

__all__ = ["Records"]


class Records:
    """Results by seed, name and everything else that they depend on.

    Args:
        directory: holds the files.
        tell: called with a sentence about a file that is damaged.
        fresh: nothing that was written before is read.
    """

    def __init__(self, directory: Path, tell: Callable[[str], None] = lambda sentence: None, *, fresh: bool = False):
        self.directory, self.tell, self.fresh = directory, tell, fresh

    def path(self, seed: int, name: str, ingredients: dict[str, Any]) -> Path:
        slug = re.sub(r"[^a-z0-9_]+", "-", name.lower())[:40].strip("-")
        return self.directory / f"seed{seed}-{slug}-{file_key(ingredients)}.json"

    def read(self, seed: int, name: str, ingredients: dict[str, Any]) -> dict[str, Any] | None:
        """What was written for the same ingredients; None where there is nothing, or a file that is damaged."""
        path = self.path(seed, name, ingredients)
        if self.fresh or not path.is_file():
            return None
        try:
            document = json.loads(path.read_text())
            if document["sha256"] == _hash(document["record"]):
                return document["record"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self.tell(f"{path.name} is damaged: run again")
        return None

    def write(self, seed: int, name: str, ingredients: dict[str, Any], record: dict[str, Any]) -> None:
        document = {"sha256": _hash(record), "record": record, "ingredients": ingredients}
        with atomic_path(self.path(seed, name, ingredients)) as partial:
            partial.write_text(json.dumps(document, indent=1, default=str) + "\n")


def _hash(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
