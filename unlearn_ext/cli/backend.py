"""The native library, built before a command's progress bars appear."""

from __future__ import annotations

import os

from rich.console import Console

__all__ = ["load_backend"]


def load_backend(console: Console) -> str:
    """``native`` or ``python``. The library's own progress lines would break the status line, so they are left out."""
    from ..errors import InputError
    from ..native import loading

    quiet = os.environ.get("UNLEARN_EXT_QUIET")
    with console.status("building the native library, once"):
        os.environ.setdefault("UNLEARN_EXT_QUIET", "1")
        try:
            return loading.load()
        except ValueError as error:  # a variable of the environment
            raise InputError(str(error)) from None
        finally:
            if quiet is None:
                del os.environ["UNLEARN_EXT_QUIET"]
