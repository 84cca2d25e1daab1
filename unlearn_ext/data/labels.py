"""Which class is meant: label texts, class maps of folders, and lists that a user types."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from .._files import user_path
from ..errors import InputError

__all__ = ["label_names", "parse_classes", "read_class_map"]


def label_names(id2label: Mapping[int, str] | None, folders: Mapping[str, int] | None = None) -> dict[str, list[int]]:
    """Text -> the classes that carry it, lower case.

    Args:
        id2label: class -> text; commas separate synonyms, as in ``DiTPipeline.labels``.
        folders: folder -> class; names that are integers are no texts.
    """
    named: dict[str, set[int]] = {}
    for index, text in (id2label or {}).items():
        for synonym in dict.fromkeys([text, *text.split(",")]):
            if synonym.strip():
                named.setdefault(synonym.strip().lower(), set()).add(int(index))
    for folder, index in (folders or {}).items():
        if not folder.isdecimal():
            named.setdefault(folder.lower(), set()).add(index)
    return {text: sorted(indices) for text, indices in named.items()}


def parse_classes(text: str | int | Iterable[str | int], classes: int, names: Mapping[str, list[int]]) -> list[int]:
    """The classes that ``"3, tench"`` names, each once, in the order given.

    A text that holds a comma itself ("tench, Tinca tinca") is found whole too. An integer is always an index.

    Args:
        text: indices and label texts separated by commas, or a list of them.
        classes: number of real classes; a null class is none of them.
        names: what :func:`label_names` returns.

    Raises:
        InputError: nothing given, an unknown or ambiguous text, an index outside the classes.
    """
    if isinstance(text, str) and text.strip().lower() in names:
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
    if word.removeprefix("-").isdecimal():
        index = int(word)
        if index == classes:
            raise InputError(f"class {index} is no class of images: the model's classes are 0 to {classes - 1}")
        if not 0 <= index < classes:
            raise InputError(f"class {index} is outside the model's {classes} classes (0 to {classes - 1})")
        return index
    found = names.get(word.lower(), [])
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{word!r} is the name of classes {' and '.join(map(str, found))}: give the index")
    if not names:
        raise InputError(f"{word!r} is no index, and there are no label texts: give indices from 0 to {classes - 1}")
    close = difflib.get_close_matches(word.lower(), names, n=3, cutoff=0.5)
    advice = f"did you mean {' or '.join(map(repr, close))}?" if close else f"it knows {_some(names)}"
    raise InputError(f"the model has no class {word!r}: {advice}")


def _some(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    shown = ", ".join(map(repr, names[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


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
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
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
            raise InputError(f"the class map {path} names the folder {folder!r} twice")
        if index in owner:
            raise InputError(f"the class map {path} gives class {index} to both {owner[index]!r} and {folder!r}")
        mapping[folder], owner[index] = index, folder
    if not mapping:
        raise InputError(f"the class map {path} is empty: expected lines of a folder and its class")
    return mapping


def _pairs_of_json(path: Path, text: str) -> list[tuple[str, object]]:
    try:
        # Pairs, for an object that names a folder twice must not lose one of them.
        content = json.loads(text, object_pairs_hook=list)
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
            pairs.append((line[: len(folder.rstrip())].rstrip(" \t,:"), int(last)))
        else:
            alone.append(line)
    if alone and pairs:
        raise InputError(f"the class map {path}: the line {alone[0]!r} has no index, and others have one")
    return pairs or [(folder, index) for index, folder in enumerate(alone)]


def _index_of(path: Path, folder: str, value: object, names: Mapping[str, list[int]]) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        if value.strip().isdecimal():
            return int(value)
        found = names.get(value.strip().lower(), [])
        if len(found) == 1:
            return found[0]
    raise InputError(f"the class map {path}: expected an index for the folder {folder!r}, got {value!r}")
