"""Configurations that others wrote, and what diffusers and transformers say where they cannot be used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .._json import read_json
from ..errors import InputError, UnlearnError, first_line
from .adapters import check_adapter_tensors

__all__ = ["as_input_error", "check_loaded", "check_sizes", "import_diffusers", "named_class", "read_config"]

_LARGEST = 1 << 24  # of a size in a configuration
_MOST_LAYERS = 1000
_KEYS = ("unexpected_keys", "missing_keys")
_NOT_LOADED = (("missing_keys", "lack"), ("mismatched_keys", "do not fit in"))


def import_diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise ImportError(
            'Diffusion models need diffusers, which is not installed: pip install "unlearn_ext[diffusion]"'
        ) from None
    return diffusers


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path} cannot be read ({reason}): it is missing or damaged") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object: it is damaged")
    return content


def check_sizes(path: Path, config: Mapping[str, Any]) -> None:
    """Whether a network of these sizes can be built at all: an absurd one would be built for hours first.

    Raises:
        InputError: a number of layers above 1,000, or any whole number above 16 million.
    """
    for key, value in config.items():
        most = _MOST_LAYERS if "layers" in key else _LARGEST
        for number in _numbers(value):
            if abs(number) > most:
                raise InputError(f"{path} says {key} = {str(number)[:30]}: it is damaged")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _numbers(part)


def named_class(config: Mapping[str, Any], key: str = "_class_name") -> str | None:
    """The name of a class in a configuration; None where there is none."""
    name = config.get(key)
    return name if isinstance(name, str) else None


@contextlib.contextmanager
def as_input_error(home: Path, what: str) -> Iterator[None]:
    """Whatever another library raises of a folder's content, as one sentence."""
    try:
        yield
    except UnlearnError:
        raise
    except Exception as error:
        raise InputError(f"the {what} in {home} cannot be opened ({first_line(error)})") from None


def check_loaded(home: Path, what: str, info: Mapping[str, Any]) -> None:
    """diffusers and transformers would go on with random numbers in place of what is missing.

    Args:
        info: the ``output_loading_info`` of ``from_pretrained``.
    """
    check_adapter_tensors(home, what, [name for key in _KEYS for name in info.get(key) or ()])
    for key, problem in _NOT_LOADED:
        names = sorted(str(name) for name in info.get(key) or ())
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"the weights of the {what} in {home} {problem} {names[0]}{more}: get the whole file")
