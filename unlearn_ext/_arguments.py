"""Checks of numbers that a user gives: one sentence where they do not fit."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .errors import InputError

__all__ = ["check_count", "check_finite", "check_number"]


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise InputError(f"{name}: expected an integer from 1, got {value!r}")


def check_number(name: str, value: Any, expected: str, fits: Callable[[float], bool]) -> None:
    """Numbers of Python and NumPy, and 0-d tensors."""
    number = isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.dim() == 0)
    try:
        good = number and fits(float(value))
    except OverflowError:  # an integer beyond all floats
        raise InputError(f"{name}: expected {expected}, got what no float holds") from None
    if not good:
        raise InputError(f"{name}: expected {expected}, got {value if number else repr(value)}")


def check_finite(name: str, value: Any) -> None:
    """A finite number from 0."""
    check_number(name, value, "a finite number from 0", lambda x: 0.0 <= x < math.inf)
