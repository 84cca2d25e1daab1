"""Files that other libraries read: what they cost is known before, and what keeps them from it is named."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import DamagedError, InputError

__all__ = ["check_opens", "check_stored", "explain_open_errors", "names_in"]

_HANDLES = 4  # as many as a library opens of one file, and of one that it maps


@contextlib.contextmanager
def explain_open_errors(*paths: str | Path) -> Iterator[None]:
    """If the block fails and a path cannot be opened, raise InputError with the system's reason.

    Of too many open files safetensors and torch make a RuntimeError, or a file that is "damaged" or "not there".

    Raises:
        InputError: with the system's reason. A file that is not there is left to the block.
    """
    try:
        yield
    except Exception:
        for path in paths:
            check_opens(path)
        raise


def check_opens(path: str | Path) -> None:
    """Raises InputError, with the system's reason, where a file that is there cannot be opened."""
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(_HANDLES):
                stack.enter_context(open(path, "rb"))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise _cannot(path, error) from None


def names_in(directory: Path) -> list[str]:
    """What is in a directory, in any order; nothing where there is none.

    Raises:
        InputError: with the system's reason.
    """
    try:
        return os.listdir(directory) if directory.is_dir() else []
    except OSError as error:
        raise _cannot(directory, error) from None


def _cannot(path: str | Path, error: OSError) -> InputError:
    return InputError(
        f"{path} cannot be opened ({error.strerror}): check who may read it and how many files may be open (ulimit -n)"
    )


def check_stored(path: str | Path) -> None:
    """Whether an archive that ``torch.load`` is to read takes no more memory than its file is long.

    torch compresses nothing that it saves, and would unpack anything: 3 MB can stand for 3 GB. Files of another format
    pass.

    Raises:
        DamagedError: a member is compressed, members overlap, or bytes stand before the archive.
        InputError: the file cannot be opened.
    """
    with explain_open_errors(path), open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # by which torch tells them
            return
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except Exception as error:  # a damaged directory can be anything
            raise DamagedError(f"{path} is damaged ({error}): get it again") from None
        whole = sum(member.file_size for member in members) <= os.fstat(file.fileno()).st_size
        stored = all(
            member.compress_type == zipfile.ZIP_STORED and member.file_size == member.compress_size
            for member in members
        )
        # torch looks for members where the directory says they are, zipfile allows for bytes before the archive
        first = min((member.header_offset for member in members), default=0)
    if not (whole and stored and first == 0):
        raise DamagedError(
            f"{path} is not as torch.save writes archives (compressed, overlapping or prefixed): load it where you "
            "trust it and save it with torch.save"
        )
