"""Parameter names without the prefixes that wrappers add."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from .errors import InputError

Value = TypeVar("Value")

_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel and DataParallel; torch.compile


def plain_name(name: str) -> str:
    """``module.layer.weight`` -> ``layer.weight``, however many wrappers stand around the model."""
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name


def by_plain_name(named: Iterable[tuple[str, Value]]) -> dict[str, Value]:
    result: dict[str, Value] = {}
    for name, value in named:
        if plain_name(name) in result:
            raise InputError(f"two parameters are called {plain_name(name)} once wrappers' prefixes are removed")
        result[plain_name(name)] = value
    return result
