"""Which class folder is which class of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import InputError
from ._source import known_classes
from .labels import composed, fold, label_names, read_class_map

__all__ = ["assign_classes", "is_sorted"]

_SORTED = "sorted"
_SYNSET = re.compile(r"n\d{8}")
_SYNSETS = 1000  # ImageNet's classes are its synsets in sorted order


def is_sorted(class_map: object) -> bool:
    """Whether a class map is no file, but says that the folders in sorted order are the classes."""
    return isinstance(class_map, (str, Path)) and str(class_map) == _SORTED


def assign_classes(
    path: Path,
    names: list[str],
    classes: int | None,
    id2label: Mapping[int, str] | None,
    class_map: str | Path | Mapping[str, int] | None,
) -> dict[str, int]:
    """Folder -> class, by the class map, by the model's label texts, by numbers, or by sorted order.

    Args:
        names: of the folders of ``path``, sorted.

    Raises:
        InputError: it is not known which folder is which class.
    """
    texts = label_names(id2label)
    if class_map is not None and not is_sorted(class_map):
        pairs = dict(class_map) if isinstance(class_map, Mapping) else read_class_map(class_map, texts)
        return _by_map(path, names, classes, pairs)
    if classes is None:
        return _in_order(names)
    if not is_sorted(class_map):
        matches = [texts.get(fold(name), []) for name in names]
        if all(len(indices) == 1 for indices in matches) and not _are_numbers(names):
            return _by_text(path, names, [index for (index,) in matches])
    if len(names) != classes:
        raise InputError(
            f"{path} has {len(names)} class folders and the model {classes} classes: say which folder is which class "
            "with a class map (--class-map)"
        )
    folders = _in_order(names)
    if _are_numbers(names) and sorted(map(int, names)) != list(range(classes)):
        raise InputError(
            f"the folders of {path} are numbers, but not 0 to {classes - 1}: say which folder is which class with "
            "a class map (--class-map)"
        )
    for name, index in folders.items():
        meant = texts.get(fold(name), [index])
        if index not in meant:
            raise InputError(
                f"the folder {name!r} would be class {index} by sorted order, and the model calls class {meant[0]} "
                "so: give a class map (--class-map)"
            )
    if classes > 1 and not (is_sorted(class_map) or _are_numbers(names) or _are_synsets(names)):
        raise InputError(_guess(path, names, texts))
    return folders


def _by_map(path: Path, names: list[str], classes: int | None, class_map: Mapping[str, int]) -> dict[str, int]:
    folders: dict[str, int] = {}
    for name in names:
        same = [index for folder, index in class_map.items() if folder == name]
        # The name of a folder may come from another system than the map.
        same = same or [index for folder, index in class_map.items() if composed(folder) == composed(name)]
        if len(same) != 1:
            problem = "names more than once" if same else "does not name"
            raise InputError(f"the class map {problem} the folder {name!r} of {path}: add it, or move it away")
        folders[name] = same[0]
    for name, index in folders.items():
        if index < 0 or (classes is not None and index >= classes):
            limits = "classes are counted from 0" if classes is None else known_classes(classes)
            raise InputError(f"the class map gives {name!r} the class {index}: {limits}")
    return folders


def _by_text(path: Path, names: list[str], indices: list[int]) -> dict[str, int]:
    folders: dict[str, int] = {}
    for name, index in zip(names, indices, strict=True):
        twin = next((other for other, taken in folders.items() if taken == index), None)
        if twin is not None:
            raise InputError(f"the folders {twin!r} and {name!r} of {path} are both class {index}: make them one")
        folders[name] = index
    return folders


def _in_order(names: list[str]) -> dict[str, int]:
    if _are_numbers(names):  # "10" stands after "9", not after "1"
        names = sorted(names, key=int)
    return {name: index for index, name in enumerate(names)}


def _are_numbers(names: list[str]) -> bool:
    return all(name.isdecimal() for name in names)


def _are_synsets(names: list[str]) -> bool:
    return len(names) == _SYNSETS and all(_SYNSET.fullmatch(name) for name in names)


def _guess(path: Path, names: list[str], texts: Mapping[str, list[int]]) -> str:
    unknown = next((name for name in names if len(texts.get(fold(name), [])) != 1), names[0])
    why = f"the model calls no class {unknown!r}" if texts else "the model has no label texts"
    return (
        f"which class the folders of {path} are can only be guessed from their sorted order ({names[0]!r} as 0"
        f"{f', {names[1]!r} as 1' if len(names) > 1 else ''}), for {why}: confirm it with --class-map sorted, or give "
        "a class map"
    )
