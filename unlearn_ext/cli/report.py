"""How every command prints, and what it writes: its result with the command line and versions, as JSON."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

__all__ = ["check_file", "plain_console", "versions", "write_report"]


def plain_console(*, stderr: bool = False, quiet: bool = False, json_file: Path | None = None) -> Console:
    """Stdout's is 80 columns wide where that is no terminal; stderr's is as wide as rich finds it.

    Text is printed as it is: a path may hold brackets, which rich would take for markup, or a name between colons,
    which it would take for an emoji. Where ``json_file`` is stdout the text goes to stderr, so that a pipe gets JSON.
    """
    stderr = stderr or _is_stdout(json_file)
    width = None if stderr or sys.stdout.isatty() else 80
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False, quiet=quiet)


def _is_stdout(file: Path | None) -> bool:
    """Whether both are one file, pipe or terminal; all may share the null device."""
    if file is None:
        return False
    try:
        named, stdout = os.stat(file), os.fstat(sys.stdout.fileno())
        return os.path.samestat(named, stdout) and not os.path.samestat(named, os.stat(os.devnull))
    except (OSError, ValueError, AttributeError):  # not there yet; stdout is closed, or replaced by an object
        return False


def check_file(
    option: str, file: Path | None, output_dir: Path | None = None, inputs: Iterable[Path | None] = ()
) -> None:
    """Whether a file that an option names can be written.

    Raises:
        InputError: its directory does not exist or cannot be written to, or it is one of ``inputs`` or a file in them,
            or lies in ``output_dir``, where it might take the place of a part of the result.
    """
    from ..errors import InputError
    from ..utils.files import check_writable

    if file is None:
        return
    real = Path(os.path.realpath(file))
    for path in inputs if file.exists() else ():
        if path is not None and real.is_relative_to(os.path.realpath(path)):
            raise InputError(f"{option}: {file} is a file of {path}, which is read: name another one")
    if output_dir is not None and real.is_relative_to(os.path.realpath(output_dir)):
        raise InputError(
            f"{option}: {file} lies in --output-dir, which gets a result.json with the same content: name a file "
            "outside it"
        )
    try:
        check_writable(file)
    except InputError as error:
        raise InputError(f"{option}: {error}") from None


def versions() -> dict[str, str]:
    import numpy
    import torch

    from ..version import __version__

    return {
        "unlearn_ext": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def write_report(result: dict[str, Any], file: Path, json_file: Path | None = None) -> dict[str, Any]:
    """Writes the command line, versions and what was found to ``file`` and, if it is given, ``json_file``."""
    from ..utils.files import write_json

    report = {"command": shlex.join(["unlearn-ext", *sys.argv[1:]]), "versions": versions(), **result}
    for path in filter(None, (file, json_file)):
        write_json(path, report)
    return report
