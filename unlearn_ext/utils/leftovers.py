"""Names of files that are being written, so that those of killed processes can be told from all others."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
from pathlib import Path

__all__ = ["LOCK", "is_leftover", "partial_name", "partial_pattern", "sweep"]

_MARK = ".unlearn_ext-"
_NAME = re.compile(re.escape(_MARK) + r"([0-9a-f]{8})-(\d+)-[0-9a-f]{8}-.*", re.DOTALL | re.ASCII)
_PROBE = re.compile(r"\.probe-[a-z0-9_]{8}", re.ASCII)  # as versions before called an empty file
LOCK = ".unlearn_ext.lock"


def partial_name(name: str) -> str:
    """Of a file or directory that is being written and shall be called ``name``; its suffix stays."""
    stem, suffix = os.path.splitext(name)
    return f"{_MARK}{_machine()}-{os.getpid()}-{secrets.token_hex(4)}-{stem[:32]}{suffix[:16]}"


def partial_pattern(name: str) -> str:
    """Of :func:`partial_name` for ``name``, as ``glob`` takes it."""
    return f"{_MARK}*-{name}"


def is_leftover(path: Path) -> bool:
    """Whether a path is something only runs make, which means nothing once they have ended."""
    if path.name == LOCK or _NAME.fullmatch(path.name):
        return True
    try:
        return bool(_PROBE.fullmatch(path.name)) and path.is_file() and path.lstat().st_size == 0
    except OSError:  # it has just gone
        return True


def sweep(directory: Path, *, held: bool = False) -> None:
    """Removes what killed processes were writing in a directory.

    Args:
        held: this process has the directory's lock, so that nobody is writing there. Else only what was written by
            processes of this machine that have ended is removed.
    """
    with contextlib.suppress(OSError):  # it is gone, or cannot be read
        for entry in os.scandir(directory):
            path = Path(entry.path)
            if path.name != LOCK and is_leftover(path) and (held or _is_orphan(path.name)):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def _is_orphan(name: str) -> bool:
    match = _NAME.fullmatch(name)
    if match is None or match[1] != _machine():
        return False
    try:
        os.kill(int(match[2]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False


@functools.cache
def _machine() -> str:
    """Names the space that process numbers are counted in: a machine since it started, or a container."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=4).hexdigest()
