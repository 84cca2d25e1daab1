"""Configurations that others wrote, and what diffusers and transformers say where they cannot be used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..data.labels import whole_number
from ..errors import InputError, UnlearnError, first_line
from ..utils.json_files import parse_json, read_text
from .adapters import check_adapter_tensors

__all__ = ["as_input_error", "check_finite", "check_id2label", "check_loaded", "check_sizes", "import_diffusers"]
__all__ += ["named_class", "read_config"]

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
        InputError: the file is missing or damaged, or has a key twice.
    """
    try:
        content = parse_json(read_text(path), object_pairs_hook=_without_repeats)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path} cannot be read ({reason}): it is missing or damaged") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object: it is damaged")
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has the key {next(key for key in keys if keys.count(key) > 1)[:100]!r} twice")
    return content


def check_id2label(path: Path, value: Any, count: int, null_label: int | None) -> tuple[dict[int, str], str | None]:
    """The texts of classes in a pipeline's index, an object or a list, as class -> text; and a sentence on those that
    are missing.

    Raises:
        InputError: a key is no class, or a text is none.
    """
    if value is None or value in ({}, []):
        return {}, None
    how = "correct id2label there, or remove it"
    if not isinstance(value, (dict, list)):
        raise InputError(f"{path}: id2label is {str(value)[:100]!r}, expected an object of classes and texts: {how}")
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    labels: dict[int, str] = {}
    for key, text in pairs:
        index = whole_number(str(key))
        if index is None or str(index) != str(key) or not (0 <= index < count or index == null_label):
            raise InputError(
                f"{path}: id2label has the key {str(key)[:100]!r}, which is none of the classes 0 to {count - 1}: {how}"
            )
        if not isinstance(text, str):
            raise InputError(f"{path}: id2label says {str(text)[:100]} of class {index}, which is no text: {how}")
        if index < count and text.strip():
            labels[index] = text
    if len(labels) == count:
        return labels, None
    first = next(index for index in range(count) if index not in labels)
    return dict(sorted(labels.items())), (
        f"id2label has texts for {len(labels)} of {count} classes: {first} and others without one go by their number"
        if count - len(labels) > 1
        else f"id2label has no text for class {first}: it goes by its number"
    )


def check_sizes(path: Path, config: Mapping[str, Any]) -> None:
    """Whether a network can be built of a configuration at all: one of absurd sizes would be built for hours first.

    Raises:
        InputError: a number of layers above 1,000, or any number above 16 million; the weights are quantised.
    """
    if config.get("quantization_config"):
        raise InputError(f"{path} is of quantised weights (quantization_config): give the model as it was before")
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


def check_finite(home: Path, what: str, model: nn.Module) -> None:
    """Weights with NaN or inf: a run would find out after all that comes before its first step.

    Raises:
        InputError: with the first of them.
    """
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise InputError(f"the weights of the {what} in {home} hold NaN or inf ({name}): get others")
