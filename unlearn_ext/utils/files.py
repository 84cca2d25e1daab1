"""Files that are either whole or not there, under names that follow ``~`` and links, with the umask's modes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError, UnlearnError, WriteError, first_line
from .leftovers import partial_name, sweep

__all__ = [
    "atomic_directory",
    "atomic_path",
    "check_writable",
    "follow_umask",
    "sync",
    "user_path",
    "writable_directory",
]
__all__ += ["write_json", "writing"]

_READER_SECONDS = 5.0  # for which a pipe waits for somebody who reads from it


def user_path(path: str | os.PathLike[str]) -> Path:
    """With ``~`` as the home folder.

    Raises:
        InputError: nobody knows where that is, or it is no path.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str) or "\0" in text:
        raise InputError(f"expected a path, as text or pathlib.Path, got {path!r}")
    full = os.path.expanduser(text)
    if full == "~" or full.startswith("~/"):
        raise InputError(f"{text}: there is no home folder that ~ could stand for: set HOME, or write the path in full")
    return Path(full)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """A failure of the disk in the block becomes a WriteError that names ``path``."""
    from safetensors import SafetensorError

    try:
        yield
    except UnlearnError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise WriteError(
            f"{path} cannot be written ({reason}): check the disk's space, the folder and its permissions", error
        ) from None


# --- Files ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: str | Path, *, private: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the block ends without an error.

    A link is followed, and what it points to is replaced. Into a device or a pipe the content is written when the
    block ends; neither is ever replaced.

    Args:
        private: only its owner may read it, at any time.

    Raises:
        WriteError: the disk is full, the directory is gone.
    """
    path = user_path(path)
    with writing(path):
        if _is_special(path):
            with tempfile.TemporaryDirectory() as folder:
                partial = Path(folder, f"content{path.suffix}")
                partial.touch(0o600)
                yield partial
                _write_through(partial, path)
            return
        target = _target(path)
        partial = target.with_name(partial_name(target.name))
        mode = _create(partial, 0o600 if private else 0o666)
        try:
            yield partial
            os.chmod(partial, mode)  # some writers make a file of their own
            sync(partial)
            os.replace(partial, target)
            sync(target.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise


def _target(path: Path) -> Path:
    """What a link stands for, whether it is there or not."""
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():  # of a link to itself there is no end
        raise WriteError(f"{path} is a link to itself: remove it, or choose another file")
    return target


def _create(path: Path, mode: int) -> int:
    """An empty file; returns the mode that the umask, or the directory, has left of ``mode``."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def _is_special(path: Path) -> bool:
    """Whether a name stands for a device, a pipe, or an open file of this process, such as /dev/stdout."""
    if _descriptor(path) is not None:
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:  # nothing there yet
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _descriptor(path: Path) -> int | None:
    """The number of an open file, where a name is one of this process's: /dev/stdout, /dev/fd/3."""
    for _ in range(10):
        folder = os.path.realpath(path.parent)
        if folder in (f"/proc/{os.getpid()}/fd", "/dev/fd") and path.name.isdecimal():
            return int(path.name)
        if not path.is_symlink():
            return None
        path = Path(folder, os.readlink(path))
    return None


def _write_through(source: Path, path: Path) -> None:
    number = _descriptor(path)
    if number is not None:
        for stream in (sys.stdout, sys.stderr):  # in the order in which it was printed
            with contextlib.suppress(AttributeError, ValueError):
                stream.flush()
        handle = os.dup(number)
    elif stat.S_ISFIFO(os.stat(path).st_mode):
        handle = _open_pipe(path)
    else:
        handle = os.open(path, os.O_WRONLY)
    # A reader that has left wants no more, which is no reason to lose what the run has made.
    with contextlib.suppress(BrokenPipeError), open(handle, "wb") as target, open(source, "rb") as content:
        shutil.copyfileobj(content, target)


def _open_pipe(path: Path) -> int:
    """Without waiting for ever where nobody reads."""
    deadline = time.monotonic() + _READER_SECONDS
    while True:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            if time.monotonic() > deadline:
                raise WriteError(f"{path} is a pipe from which nobody reads: start its reader first") from None
            time.sleep(0.02)
        else:
            os.set_blocking(handle, True)
            return handle


def sync(path: str | Path) -> None:
    """Waits until a file, or a directory's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not os.path.isdir(path):  # which not every file system can do
            raise
    finally:
        os.close(handle)


# --- Directories ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """The same for a directory; one that is there already is replaced.

    Raises:
        WriteError: the disk is full, the directory above is gone.
    """
    path = user_path(path)
    partial, old = (path.with_name(partial_name(path.name)) for _ in range(2))
    with writing(path):
        partial.mkdir()
        try:
            yield partial
            _sync_tree(partial)
            if os.path.lexists(path):  # aside first: a kill in mid-removal must not leave a damaged one under the name
                os.replace(path, old)
            os.replace(partial, path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            if os.path.lexists(old) and not os.path.lexists(path):
                os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _sync_tree(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            sync(Path(folder, name))
        sync(folder)


def follow_umask(directory: Path) -> None:
    """Gives the files in it the mode that any new file has: some writers make theirs private."""
    probe = directory / partial_name("mode")
    mode = _create(probe, 0o666)
    probe.unlink()
    for folder, _, names in os.walk(directory):
        for name in names:
            os.chmod(Path(folder, name), mode)


def writable_directory(path: str | Path) -> Path:
    """Makes the directory if need be, proves that files can be written there, and removes what killed processes were
    writing. The path returned is absolute: whoever keeps it stays there when the working directory changes."""
    path = user_path(path).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        # without a name, where the file system can
        with tempfile.TemporaryFile(dir=path, prefix=partial_name("probe")):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write to {path} ({reason}): choose another output directory") from None
    sweep(path)
    return path


def write_json(path: str | Path, document: Any) -> None:
    """A whole file of JSON, or none."""
    text = json.dumps(document, indent=2) + "\n"
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_writable(path: str | Path) -> None:
    """Whether :func:`atomic_path` can write there; nothing is.

    Raises:
        InputError: it cannot.
    """
    path = user_path(path)
    if _descriptor(path) is not None:
        return
    if _is_special(path):
        if not os.access(path, os.W_OK):
            raise InputError(f"cannot write to {path} (Permission denied): choose another file")
        return
    target = _target(path)
    if not target.parent.is_dir() or target.is_dir():
        raise InputError(f"expected a file in a directory that exists, got {path}")
    writable_directory(target.parent)
