"""Values as JSON has them: settings, and whatever an evaluation returns."""

from __future__ import annotations

import dataclasses
import enum
import math
import numbers
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["plain", "plain_numbers"]

_DEEPEST = 50  # levels; what is deeper, or holds itself, is kept as text


def plain_numbers(value: Any) -> Any:
    """Numbers of NumPy and others, and 0-d tensors, as Python's own; within lists, tuples and dicts too. All else as
    it is."""
    if isinstance(value, np.generic) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0):
        return value.item()
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if type(value) in (list, tuple):
        return type(value)(map(plain_numbers, value))
    if type(value) is dict:
        return {key: plain_numbers(item) for key, item in value.items()}
    return value


def plain(value: Any, depth: int = 0) -> Any:
    """As JSON has it: keys are text, NaN and infinities are None, tensors and arrays lists, dataclasses dicts."""
    if value is None or isinstance(value, (bool, np.bool_)):
        return value if value is None else bool(value)
    if isinstance(value, enum.Enum):
        return plain(value.value, depth + 1)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        return number if math.isfinite(number) else None
    if depth < _DEEPEST:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return _with_text_keys(value, depth)
        if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
            return [plain(item, depth + 1) for item in value]
        if isinstance(value, Set):
            return [plain(item, depth + 1) for item in _sorted(value)]
        if (items := _items(value)) is not None:
            return plain(items, depth + 1)
    return str(value)


def _with_text_keys(values: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    """Keys of one text, such as 1 and "1", stay apart: the second has its type with it."""
    found: dict[str, Any] = {}
    for key, item in values.items():
        text = _key(key)
        while text in found:
            text += f" ({type(key).__name__})"
        found[text] = plain(item, depth + 1)
    return found


def _key(key: Any) -> str:
    """As json writes those that it takes, and the text of what others hold."""
    if isinstance(key, enum.Enum):
        key = key.value
    key = plain_numbers(key)
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    return repr(float(key)) if isinstance(key, float) else str(key)


def _sorted(values: Set[Any]) -> list[Any]:
    try:
        return sorted(values)
    except TypeError:
        return list(values)


def _items(value: Any) -> Any:
    """Of tensors, arrays, and what else has ``tolist``; None where there is none, or it fails."""
    try:
        return value.tolist()
    except Exception:  # of any library's: a sparse tensor's, one on the meta device
        return None
