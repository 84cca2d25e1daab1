"""Which class is meant: label texts, class maps of folders, and lists that a user types."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import InputError
from ..utils.files import user_path
from ..utils.json_files import parse_json, read_text
from ..utils.text import decoded

__all__ = ["composed", "fold", "label_names", "parse_classes", "printable", "read_class_map", "whole_number"]

_MOST_DIGITS = 18  # of a class: it fits into 64 bits


def composed(text: str) -> str:
    """Decoded, in Unicode's normal form C: keyboards give an é as one character, and some file systems as two."""
    return unicodedata.normalize("NFC", decoded(text))


def fold(text: str) -> str:
    """What texts are compared by: without case, normal form and surrounding space."""
    return composed(text.strip().lower())


def printable(name: str) -> str:
    """The name of a file as text, whatever bytes it is made of: others than UTF-8's could not be printed."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return name.encode("utf-8", "replace").decode()


def whole_number(text: str) -> int | None:
    """The integer that a text is; None if it is none, or has more than 18 digits."""
    digits = text.removeprefix("-")
    return int(text) if digits.isdecimal() and len(digits) <= _MOST_DIGITS else None


def label_names(id2label: Mapping[int, str] | None, folders: Mapping[str, int] | None = None) -> dict[str, list[int]]:
    """Text -> the classes that carry it, lower case and in normal form C.

    Args:
        id2label: class -> text; commas separate synonyms, as in ``DiTPipeline.labels``.
        folders: folder -> class.
    """
    named: dict[str, set[int]] = {}
    for index, text in (id2label or {}).items():
        for synonym in dict.fromkeys([text, *text.split(",")]):
            if synonym.strip():
                named.setdefault(fold(synonym), set()).add(int(index))
    for folder, index in (folders or {}).items():
        named.setdefault(fold(folder), set()).add(index)
    return {text: sorted(indices) for text, indices in named.items()}


def parse_classes(text: str | int | Iterable[str | int], classes: int, names: Mapping[str, list[int]]) -> list[int]:
    """The classes that ``"3, tench"`` names, each once, in the order given.

    A text that holds a comma itself ("tench, Tinca tinca") is found whole too. A number is an index; where it is also
    the text of another class, ``"index 7"`` and ``"label 7"`` say which is meant, and ``7`` alone, as text, is refused.

    Args:
        text: indices and label texts separated by commas, or a list of them.
        classes: number of real classes; a null class is none of them.
        names: what :func:`label_names` returns.

    Raises:
        InputError: nothing given, an unknown or ambiguous text, an index outside the classes.
    """
    if isinstance(text, str) and fold(text) in names:
        parts: list[str | int] = [text]
    elif isinstance(text, str):
        parts = [part for part in text.split(",") if part.strip()]
    else:
        parts = [text] if isinstance(text, int) else list(text)
    if not parts:
        raise InputError("no class to forget was named: give an index or a label text, several separated by commas")
    return list(dict.fromkeys(_class_of(part, classes, names) for part in parts))


def _class_of(part: str | int, classes: int, names: Mapping[str, list[int]]) -> int:
    word = str(part).strip()
    matches, kind = names.get(fold(word), []), "" if isinstance(part, str) else "index"
    if not matches and word.startswith(("index ", "label ")):
        kind, word = word.split(maxsplit=1)
        matches = names.get(fold(word), [])
    if kind != "label" and word.removeprefix("-").isdecimal():
        index = whole_number(word)
        there = index is not None and 0 <= index < classes
        if there and not kind and matches not in ([], [index]):
            raise InputError(
                f"{word!r} is the index of one class and the label text or folder of class "
                f"{' and '.join(map(str, matches))}: say 'index {word}' or 'label {word}'"
            )
        if there:
            return index
        if kind or not matches:
            no_image = "is no class of images: the model's classes are"
            outside = f"is outside the model's {classes} classes,"
            raise InputError(f"class {_short(word)} {no_image if index == classes else outside} 0 to {classes - 1}")
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise InputError(f"{word!r} is the name of classes {' and '.join(map(str, matches))}: give the index")
    if not names:
        raise InputError(
            f"{_short(word)!r} is no index, and there are no label texts: give indices from 0 to {classes - 1}"
        )
    close = difflib.get_close_matches(fold(word), names, n=3, cutoff=0.5) if len(word) < 200 else []
    advice = f"did you mean {' or '.join(map(repr, close))}?" if close else f"it knows {_some(names)}"
    raise InputError(f"the model has no class {_short(word)!r}: {advice}")


def _some(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    shown = ", ".join(map(repr, names[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _short(text: object, most: int = 100) -> str:
    text = str(text)
    return text if len(text) <= most else f"{text[:most]}…"


def read_class_map(path: str | Path, names: Mapping[str, list[int]] | None = None) -> dict[str, int]:
    """Folder -> class from a file.

    Either a JSON object ``{folder: index}`` (or ``{folder: label text}``, where the model has texts), a JSON list of
    folders in the order of classes, or text: lines of ``folder index`` (a space, tab, comma or colon between them), or
    of one folder each, in the order of classes. Empty lines and lines that start with ``#`` are passed over.

    Raises:
        InputError: the file cannot be read, a line is neither, or two folders are one class.
    """
    path = user_path(path)
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise InputError(f"the class map {path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if path.suffix.lower() == ".json" or text.lstrip().startswith(("{", "[")):
        pairs = _pairs_of_json(path, text)
    else:
        pairs = _pairs_of_lines(path, text)
    mapping: dict[str, int] = {}
    owner: dict[int, str] = {}
    for folder, value in pairs:
        index = _index_of(path, folder, value, names or {})
        if folder in mapping:
            raise InputError(f"the class map {path} names the folder {_short(folder)!r} twice")
        if index in owner:
            raise InputError(
                f"the class map {path} gives class {index} to both {_short(owner[index])!r} and {_short(folder)!r}"
            )
        mapping[folder], owner[index] = index, folder
    if not mapping:
        raise InputError(f"the class map {path} is empty: expected lines of a folder and its class")
    return mapping


def _pairs_of_json(path: Path, text: str) -> list[tuple[str, object]]:
    try:
        # Pairs, for an object that names a folder twice must not lose one of them.
        content = parse_json(text, object_pairs_hook=list)
    except ValueError as error:
        raise InputError(f"the class map {path} is not valid JSON ({error})") from None
    if isinstance(content, list) and all(isinstance(entry, str) for entry in content):
        return [(folder, index) for index, folder in enumerate(content)]
    if isinstance(content, list) and all(isinstance(entry, tuple) for entry in content):
        return content
    raise InputError(f"the class map {path}: expected a JSON object of folder and index")


def _pairs_of_lines(path: Path, text: str) -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    alone: list[str] = []
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        folder, _, last = line.replace("\t", " ").replace(",", " ").replace(":", " ").rpartition(" ")
        if folder.strip() and last.removeprefix("-").isdecimal():
            pairs.append((line[: len(folder.rstrip())].rstrip(" \t,:"), last))
        else:
            alone.append(line)
    if alone and pairs:
        raise InputError(f"the class map {path}: the line {_short(alone[0])!r} has no index, and others have one")
    return pairs or [(folder, index) for index, folder in enumerate(alone)]


def _index_of(path: Path, folder: str, value: object, names: Mapping[str, list[int]]) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**_MOST_DIGITS:
        return value
    if isinstance(value, str):
        number = whole_number(value.strip())
        if number is not None:
            return number
        matches = names.get(fold(value), [])
        if len(matches) == 1:
            return matches[0]
    raise InputError(
        f"the class map {path}: expected an index for the folder {_short(folder)!r}, got {_short(repr(value))}"
    )
