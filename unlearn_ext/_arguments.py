"""Checks of numbers that a user gives: one sentence where they do not fit."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .errors import InputError

__all__ = ["check_count", "check_finite", "check_number", "shown"]

_LONGEST = 80  # letters of a value within a sentence
_LARGEST = 2**63 - 1  # what a tensor's size can be, and most other counts


def shown(value: Any) -> str:
    """A value as Python writes it, cut to what a sentence can hold; Python writes no integer of 4,300 digits."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"{type(value).__name__} of very many digits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def check_count(name: str, value: Any) -> None:
    """An integer from 1 that fits 64 bits."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise InputError(f"{name}: expected an integer from 1, got {shown(value)}")
    if value > _LARGEST:
        raise InputError(f"{name}: expected an integer from 1 to 2^63 - 1, got {shown(value)}")


def check_number(name: str, value: Any, expected: str, fits: Callable[[float], bool]) -> None:
    """Numbers of Python and NumPy, and 0-d tensors."""
    number = isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.dim() == 0)
    try:
        good = number and fits(float(value))
    except OverflowError:  # an integer beyond all floats
        raise InputError(f"{name}: expected {expected}, got what no float holds") from None
    except RuntimeError:  # a complex tensor, or one without values
        good = False
    if not good:
        raise InputError(f"{name}: expected {expected}, got {value if number else shown(value)}")


def check_finite(name: str, value: Any) -> None:
    """A finite number from 0."""
    check_number(name, value, "a finite number from 0", lambda x: 0.0 <= x < math.inf)
