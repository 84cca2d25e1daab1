"""Text as it was typed, whatever the locale."""

from __future__ import annotations

__all__ = ["decoded"]


def decoded(text: str) -> str:
    """What was typed, or a file's name, as in a UTF-8 locale: Python leaves such bytes undecoded in an ASCII one."""
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:  # other bytes
        return text
