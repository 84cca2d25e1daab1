"""JSON that others wrote, read within bounds: whatever is wrong with it is a ValueError of one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["MOST_BYTES", "parse_json", "read_json", "read_text"]

MOST_BYTES = 16 << 20
_MOST_DIGITS = 64  # of an integer; transformers writes 10^30 for a length without a limit


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, or has more than ``most`` bytes.
    """
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text, from byte {error.start} on") from None


def parse_json(text: str, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What ``json.loads`` gives.

    Raises:
        ValueError: no JSON, nested too deeply, or with an integer of more than 64 digits.
    """
    try:
        return json.loads(text, parse_int=_integer, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | Path, most: int = MOST_BYTES) -> Any:
    """:func:`parse_json` of :func:`read_text`."""
    return parse_json(read_text(path, most))


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"it has an integer of {len(digits)} digits")
    return int(digits)
