"""Output that a terminal's encoding cannot spell, and pipes whose reader has left."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import stat
import sys
from collections.abc import Iterator
from typing import Any, TextIO

__all__ = ["escape_unprintable", "is_unicode", "outlive_readers"]

_HANDLER, _PASSING = "unlearn_ext.spell", "unlearn_ext.spell_or_pass"
_SPELLED = {"×": "x", "±": "+-", "–": "-", "−": "-", "≥": ">=", "é": "e", "✓": "ok"}
_SPELLED |= {"α": "alpha", "γ": "gamma", "ε": "epsilon", "η": "eta", "λ": "lambda", "τ": "tau", "Σ": "sum"}
_SPELLED |= {"‖": "|", "⟨": "<", "⟩": ">", "²": "^2", "₀": "_0", "∅": "{}"}
_OUTPUTS = ("stdout", "stderr")


@contextlib.contextmanager
def escape_unprintable() -> Iterator[None]:
    """Stdout and stderr spell this package's symbols where they have no letter for them, instead of raising.

    Names and paths of the user's are not spelled, for no file is called so: a letter of theirs becomes an escape such
    as \\xe9, as do the bytes of a file name that is not UTF-8; in an ASCII locale Python passes such bytes on.
    """
    codecs.register_error(_HANDLER, _spell)
    codecs.register_error(_PASSING, _spell_or_pass)
    changed = []
    for stream in (sys.stdout, sys.stderr):
        errors = getattr(stream, "errors", None)
        if errors in ("strict", "backslashreplace", "surrogateescape") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_PASSING if errors == "surrogateescape" else _HANDLER)
            changed.append((stream, errors))
    try:
        yield
    finally:
        for stream, errors in changed:
            with contextlib.suppress(ValueError):  # closed meanwhile
                stream.reconfigure(errors=errors)


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        return codecs.backslashreplace_errors(error)
    error.end = error.start + 1
    spelled = _SPELLED.get(error.object[error.start])
    before, after = error.object[max(0, error.start - 99) : error.start], error.object[error.start :][:99]
    word = re.split(r"\s", before)[-1] + re.split(r"\s", after)[0]
    if spelled is None or "/" in word or (spelled == "e" and "Fréchet" not in word):
        return codecs.backslashreplace_errors(error)
    return spelled, error.end


def _spell_or_pass(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeEncodeError) and "\udc80" <= error.object[error.start] <= "\udcff":
        error.end = error.start + 1
        return codecs.lookup_error("surrogateescape")(error)
    return _spell(error)


def is_unicode(encoding: str | None) -> bool:
    """Whether every symbol can be written."""
    return (encoding or "").lower().replace("_", "-").startswith("utf")


# --- Pipes ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def outlive_readers() -> Iterator[None]:
    """Where the reader of a pipe leaves, as ``head`` does, or an output was closed from the start, what is printed goes
    nowhere, and the command goes on."""
    before = {name: getattr(sys, name) for name in _OUTPUTS}
    for name, stream in before.items():
        if stream is None:  # also takes its number, which the first file that is opened would have
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends
        elif _is_pipe(stream):
            stream.flush()
            pipe: io.RawIOBase = _Pipe(stream.fileno(), "wb", closefd=False)
            settings = {"encoding": stream.encoding, "errors": stream.errors, "line_buffering": stream.line_buffering}
            writer = io.TextIOWrapper(io.BufferedWriter(pipe), **settings, write_through=stream.write_through)
            setattr(sys, name, writer)
    try:
        yield
    finally:
        for name, stream in before.items():
            if getattr(sys, name) is not stream:
                getattr(sys, name).flush()
                setattr(sys, name, stream)


class _Pipe(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # for all who write there, the interpreter's end among them
            os.close(null)
            return len(data)


def _is_pipe(stream: TextIO | None) -> bool:
    if not isinstance(stream, io.TextIOWrapper):
        return False
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError):  # closed, or above no file
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
