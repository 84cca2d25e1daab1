"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError

__all__ = ["atomic_directory", "atomic_path", "writable_directory", "write_json"]


@contextlib.contextmanager
def atomic_path(path: str | Path, *, private: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the block ends without an error.

    ``private``: only its owner may read it, at any time.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o600 if private else 0o666 & ~_umask())  # mkstemp's files are private
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """The same for a directory; one that is there already is replaced."""
    path = Path(path)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield partial
        os.chmod(partial, 0o777 & ~_umask())
        if path.exists():  # aside first: a kill in mid-removal must not leave a damaged directory under the name
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
            os.replace(path, old)
            os.replace(partial, path)
            shutil.rmtree(old)
        else:
            os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def writable_directory(path: str | Path) -> Path:
    """Makes the directory if need be and proves that files can be written there."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".probe-"):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write to {path} ({reason}): choose another output directory") from None
    return path


def write_json(path: str | Path, document: Any) -> None:
    """A whole file of JSON, or none."""
    text = json.dumps(document, indent=2) + "\n"
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
