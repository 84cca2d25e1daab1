"""Warnings that point at the line of the user's program, however deep in the package they arise."""

from __future__ import annotations

import os
import sys
import warnings

from ..errors import UnlearningWarning

__all__ = ["PACKAGE", "warn"]

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def warn(message: str, category: type[Warning] = UnlearningWarning) -> None:
    """``warnings.warn`` as of the nearest caller outside the package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and os.path.abspath(frame.f_code.co_filename).startswith(PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
