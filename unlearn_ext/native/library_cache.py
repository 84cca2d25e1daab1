"""Which libraries of a cache may be loaded: those that this user put there, where nobody else can put any.

A library is code, so whoever can write to a cache can run what they like as whoever loads from it. A library is
loaded when its directory, the cache and the file itself belong to this user or to root and can be written by nobody
else, none of them is a link, and its content has the hash that was written beside it when it was built. The hash
finds what disks and interrupted copies do; against people it is the ownership that helps.

What this does not defend against: root, and other processes of this user, which can do all that this one can. The
directory is held open from the check to the loading, so another one cannot be put in its place; a build, however,
goes by path, and who may rename the directories above the cache (their owners, or a group that may write to them)
could exchange them while it runs. Directories above that everybody may write to are refused for that reason, unless
they have the sticky bit, as /tmp has. A file that somebody opened for writing while others were allowed to is not
noticed either, if its owner closes it to them later.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["MISSING", "CacheDirectory", "UnusableError", "is_noexec", "make_private", "put"]

MISSING = "is not there"
_HASH_SUFFIX = ".sha256"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# A name that is a pipe must not be waited for, a link not be followed.
_OPEN = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


class UnusableError(Exception):
    """A directory that cannot be a cache; the message says which and why, and goes on in a sentence."""


class CacheDirectory:
    """One directory of a cache, checked, and held open so that its name cannot come to mean another one."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def open(cls, root: Path, name: str, *, create: bool) -> CacheDirectory | None:
        """``root/name``, with all directories that are missing if they may be created; ``None`` without.

        Raises:
            UnusableError: others could put libraries there, or it cannot be opened or made.
        """
        root = Path(os.path.realpath(root))  # a home directory may be reached through links
        path = root / name
        with _explained(path):
            _check_above(root)
            if create:
                make_private(path)
            try:
                parent = _open_directory(root)
            except FileNotFoundError:
                return None
            try:
                _check_owner(root, os.fstat(parent), sticky=True)
                directory = cls(path, _open_directory(path, parent))
            except FileNotFoundError:
                return None
            finally:
                os.close(parent)
            directory._check()
        return directory

    def _check(self) -> None:
        _check_owner(self.path, os.fstat(self._descriptor))
        if is_noexec(self._descriptor):
            raise UnusableError(f"{self.path} is on a file system mounted noexec, from which no library loads")

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._descriptor)

    def fault(self, name: str) -> str | None:
        """Why a library must not be loaded, or ``MISSING``; ``None``: it is what was built here."""
        try:
            with self._file(name) as file:
                digest = _digest(file)
        except FileNotFoundError:
            return MISSING
        except (UnusableError, OSError) as error:
            return _said(error)
        try:
            with self._file(name + _HASH_SUFFIX) as file:
                recorded = os.read(file, 64).decode(errors="replace")
        except FileNotFoundError:
            return "has no hash beside it"
        except (UnusableError, OSError) as error:
            return f"has a hash beside it that {_said(error)}"
        return None if recorded == digest else "is not what was built there: its hash differs"

    @contextlib.contextmanager
    def _file(self, name: str) -> Iterator[int]:
        try:
            descriptor = os.open(name, _OPEN, dir_fd=self._descriptor)
        except OSError:
            if _is_link(name, self._descriptor):
                raise UnusableError("is a link") from None
            raise
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UnusableError("is not a file")
            if reason := _foreign(status):
                raise UnusableError(reason)
            yield descriptor
        finally:
            os.close(descriptor)

    def loadable(self, name: str) -> str:
        """A path that leads to this directory whatever has come to stand under its name, while it is held open.

        With the library's name at its end, because the loader takes equal paths for the same library.
        """
        path = f"/proc/{os.getpid()}/fd/{self._descriptor}/{name}"
        return path if os.path.exists(path) else str(self.path / name)


def put(source: Path, target: Path) -> None:
    """Give a built library its name, beside its hash; what stands there goes, be it a directory.

    The hash comes first: whoever sees a library sees its hash. Content before names: a power cut leaves no half one.
    """
    sums = source.with_name(source.name + _HASH_SUFFIX)
    descriptor = os.open(source, os.O_RDONLY)
    try:
        os.fchmod(descriptor, 0o700)
        sums.write_bytes(_digest(descriptor).encode() + b"  " + os.fsencode(target.name) + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.chmod(sums, 0o600)
    replace(sums, target.with_name(target.name + _HASH_SUFFIX))
    replace(source, target)


def replace(source: Path, target: Path) -> None:
    """``os.replace`` that also replaces a directory."""
    if target.is_dir() and not target.is_symlink():
        with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent, ignore_cleanup_errors=True) as aside:
            os.replace(target, Path(aside, "old"))
    os.replace(source, target)


def make_private(path: Path) -> None:
    """Make a directory and those above it that are missing, for this user alone whatever the umask."""
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for directory in reversed(missing):
        with contextlib.suppress(FileExistsError):  # also made by another process meanwhile
            os.mkdir(directory, 0o700)


def is_noexec(place: int | str) -> bool:
    """Whether the file system of a path or descriptor forbids to run, and so to load, what is on it."""
    return bool(os.statvfs(place).f_flag & getattr(os, "ST_NOEXEC", 0))


def _check_above(root: Path) -> None:
    """Refuse a cache that those who may write to the directories above it could exchange for another."""
    there = next((path for path in root.parents if os.path.lexists(path)), root)  # above / is nothing
    # Root does not write into another user's home, as under sudo. pip keeps to the same rule.
    if os.geteuid() == 0 and not root.exists() and there.stat().st_uid != 0:
        raise UnusableError(f"{there} belongs to another user (uid {there.stat().st_uid}, and this process is root's)")
    for path in (there, *there.parents):
        mode = path.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise UnusableError(f"{path} can be written by everybody, which `chmod +t` or `chmod o-w` ends")


def _check_owner(path: Path, status: os.stat_result, *, sticky: bool = False) -> None:
    """``sticky``: a directory such as /tmp will do, where nobody can exchange what others made."""
    if sticky and status.st_mode & stat.S_ISVTX and status.st_uid in (0, os.geteuid()):
        return
    if reason := _foreign(status):
        remedy = "" if status.st_uid not in (0, os.geteuid()) else f", which `chmod go-w {shlex.quote(str(path))}` ends"
        raise UnusableError(f"{path} {reason}{remedy}")


def _foreign(status: os.stat_result) -> str | None:
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to another user (uid {status.st_uid}, and this process has {os.geteuid()})"
    if status.st_mode & _OTHERS_WRITE:
        return "can be written by others"
    return None


def _open_directory(path: Path, parent: int | None = None) -> int:
    name, options = (path, {}) if parent is None else (path.name, {"dir_fd": parent})
    try:
        return os.open(name, _OPEN | os.O_DIRECTORY, **options)
    except OSError:
        if _is_link(name, parent):
            raise UnusableError(f"{path} is a link") from None
        raise


def _is_link(name: str | Path, parent: int | None) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except OSError:
        return False


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What the system says of the path, as an :class:`UnusableError`."""
    try:
        yield
    except NotADirectoryError:
        there = next((p for p in (path, *path.parents) if p.is_file()), path)
        raise UnusableError(f"{there} is a file, where a directory is needed") from None
    except OSError as error:
        raise UnusableError(f"cannot use {path} ({error.strerror or error})") from None


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, UnusableError) else f"cannot be read ({getattr(error, 'strerror', error)})"


def _digest(descriptor: int) -> str:
    digest = hashlib.sha256()
    while chunk := os.read(descriptor, 1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
