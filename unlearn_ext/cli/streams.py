"""Output that a terminal's encoding cannot spell."""

from __future__ import annotations

import codecs
import contextlib
import sys
from collections.abc import Iterator

__all__ = ["escape_unprintable", "is_unicode"]

_HANDLER = "unlearn_ext.spell"
_SPELLED = {"×": "x", "±": "+-", "–": "-", "−": "-", "≥": ">=", "é": "e", "✓": "ok"}
_SPELLED |= {"α": "alpha", "γ": "gamma", "ε": "epsilon", "η": "eta", "λ": "lambda", "τ": "tau", "Σ": "sum"}
_SPELLED |= {"‖": "|", "⟨": "<", "⟩": ">", "²": "^2", "₀": "_0", "∅": "{}"}


@contextlib.contextmanager
def escape_unprintable() -> Iterator[None]:
    """Stdout and stderr spell what they have no letter for, or write an escape such as \\u2713, instead of raising.

    An ASCII locale has no letters with accents, and UTF-8 has none for the bytes of a file name that is not UTF-8.
    """
    codecs.register_error(_HANDLER, _spell)
    changed = []
    for stream in (sys.stdout, sys.stderr):
        errors = getattr(stream, "errors", None)
        if errors in ("strict", "backslashreplace") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_HANDLER)
            changed.append((stream, errors))
    try:
        yield
    finally:
        for stream, errors in changed:
            with contextlib.suppress(ValueError):  # closed meanwhile
                stream.reconfigure(errors=errors)


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeEncodeError) and (spelled := _SPELLED.get(error.object[error.start])):
        return spelled, error.start + 1
    return codecs.backslashreplace_errors(error)


def is_unicode(encoding: str | None) -> bool:
    """Whether every symbol can be written."""
    return (encoding or "").lower().replace("_", "-").startswith("utf")
