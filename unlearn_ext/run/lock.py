"""One run at a time in an output folder: a lock that the kernel takes from a process that ends, however it ends."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from ..distributed.ranks import Ranks
from ..errors import InputError
from ..utils.files import writing
from ..utils.leftovers import LOCK, sweep
from ..utils.warn import warn

__all__ = ["hold", "hold_on_first", "refuse_held"]

_held: set[int] = set()


def _release_in_child() -> None:
    """A forked child, such as a loader's worker, would hold the lock of a run that was killed."""
    for handle in _held:
        with contextlib.suppress(OSError):
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


@contextlib.contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Keeps other runs out of the directory within the block, and removes what killed ones were writing there.

    Raises:
        InputError: another run holds it; the message names that run.
    """
    path = directory / LOCK
    with writing(directory):
        handle = _lock(path)
    if handle is None:
        yield
        return
    _held.add(handle)
    try:
        sweep(directory, held=True)
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder has gone
            if _is_at(handle, path):
                os.unlink(path)
        _held.discard(handle)
        os.close(handle)


@contextlib.contextmanager
def hold_on_first(directory: Path | None, ranks: Ranks) -> Iterator[None]:
    """:func:`hold` by the first of several ranks, for all of them."""
    with contextlib.ExitStack() as stack:
        with ranks.together():
            if directory is not None and ranks.first:
                stack.enter_context(hold(directory))
        yield


def refuse_held(directory: Path) -> None:
    """Raises what :func:`hold` would where another run holds the directory; changes nothing.

    For those who would otherwise advise to remove what that run is writing.
    """
    with contextlib.suppress(ImportError, OSError):  # no locks; no lock file
        import fcntl

        handle = os.open(directory / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(_refusal(directory, os.pread(handle, 4096, 0))) from None
        finally:
            os.close(handle)


def _lock(path: Path) -> int | None:
    """The locked file's handle; None where the file system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 4096, 0)
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise InputError(_refusal(path.parent, holder)) from None
            warn(f"{path.parent} cannot be locked ({error.strerror}): see to it that no other run writes there")
            return None
        if _is_at(handle, path):  # else its last holder has just removed it
            break
        os.close(handle)
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": platform.node(), "started": started}).encode(), 0)
    return handle


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except OSError:
        return False


def _refusal(directory: Path, holder: bytes) -> str:
    who = "another run"
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        said = json.loads(holder)
        who = f"another run (process {said['pid']} on {said['host']}, started {said['started']})"
    return f"{who} is writing to {directory}: wait until it has ended, end it, or choose another output directory"
