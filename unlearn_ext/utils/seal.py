"""``SHA256SUMS`` in a directory: hashes by which every changed bit of its files is noticed before they are used.

``sha256sum --check SHA256SUMS`` checks it as well. The first line says whose files they are and how many.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from .files import atomic_path, sync
from .hashing import file_hash

__all__ = ["SEAL", "damage", "label_of", "seal"]

SEAL = "SHA256SUMS"
_HEADER = re.compile(r"# unlearn_ext ([\w .:-]+), (\d+) files", re.ASCII)
_LINE = re.compile(r"([0-9a-f]{64})  ([^\0\n]+)")


def seal(directory: Path, label: str, names: Iterable[str] | None = None) -> None:
    """Writes the hashes of the files; by default of all that are there. They are on the disk before their hashes."""
    if names is None:
        paths = (path for path in directory.rglob("*") if path.is_file() and path != directory / SEAL)
        names = (path.relative_to(directory).as_posix() for path in paths)
    names = sorted(names)
    for name in names:
        sync(directory / name)
    lines = [f"# unlearn_ext {label}, {len(names)} files"]
    lines += [f"{file_hash(directory / name)}  {name}" for name in names]
    with atomic_path(directory / SEAL) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def label_of(directory: Path) -> str | None:
    """Whose files they are; None where that cannot be read. Nothing is checked."""
    try:
        first = (directory / SEAL).read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, ValueError):
        return None
    match = _HEADER.fullmatch(first)
    return None if match is None else match[1]


def damage(directory: Path, label: str | None = None, *, alone: bool = False) -> str | None:
    """What is wrong with the first file that is not as it was written, or None.

    Args:
        label: whose files they have to be; None where something else tells.
        alone: no other file may be there, as where those that are there decide what is read. Names with a leading dot,
            such as ``.DS_Store``, do no harm.
    """
    try:
        text = (directory / SEAL).read_bytes().decode("utf-8")
    except FileNotFoundError:
        return f"its {SEAL} is missing"
    except (OSError, ValueError):
        return f"its {SEAL} cannot be read"
    first, *lines = text.split("\n")
    header, entries = _HEADER.fullmatch(first), [entry for line in lines[:-1] if (entry := _LINE.fullmatch(line))]
    if header is None or lines[-1:] != [""] or not int(header[2]) == len(entries) == len(lines) - 1:
        return f"its {SEAL} cannot be read"
    if label not in (None, header[1]):
        return f"its {SEAL} cannot be read"
    for expected, name in (entry.groups() for entry in entries):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            return f"its {SEAL} cannot be read"
        try:
            found = file_hash(directory / path)
        except FileNotFoundError:
            return f"its {_printable(name)} is missing"
        except OSError as error:
            return f"its {_printable(name)} cannot be read ({error.strerror})"
        if found != expected:
            return f"its {_printable(name)} is not as it was written"
    if alone and (name := _unlisted(directory, {PurePosixPath(entry[2]).as_posix() for entry in entries})) is not None:
        return f"it holds {_printable(name)}, which is not in its {SEAL}"
    return None


def _printable(name: str) -> str:
    """A damaged list holds any name."""
    return name if name.isprintable() else repr(name)


def _unlisted(directory: Path, names: set[str]) -> str | None:
    """The first file that is not among ``names``, or folder that is a link."""
    for folder, folders, files in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted([*files, *links]):
            path = Path(folder, name).relative_to(directory)
            hidden = name.startswith(".") and path.suffix != ".safetensors"  # those of a folder are all read
            if not hidden and path.as_posix() not in {*names, SEAL}:
                return path.as_posix()
    return None
