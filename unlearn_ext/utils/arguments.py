"""Checks of arguments that a user gives: one sentence where they do not fit."""

from __future__ import annotations

import difflib
import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

__all__ = [
    "as_number",
    "check_choice",
    "check_count",
    "check_device",
    "check_finite",
    "check_instance",
    "check_model",
    "check_number",
    "check_seed",
    "describe",
    "is_dense",
    "nearest",
]

LARGEST_COUNT = 2**63 - 1  # what an int64 holds
_LONGEST = 80  # letters of a value within a sentence


# --- Numbers ------------------------------------------------------------------------------------------------


def as_number(value: Any) -> int | float | None:
    """Python's int or float of a number of Python or NumPy or of a 0-d tensor or array, which JSON can hold; None for
    anything else, bools and complex numbers among it."""
    if isinstance(value, Tensor) or type(value).__module__ == "numpy":
        if getattr(value, "ndim", None) != 0 or (isinstance(value, Tensor) and value.is_meta):
            return None
        value = value.item()
    if isinstance(value, bool):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else None


def check_count(name: str, value: Any) -> int:
    """An integer from 1 that an int64 holds, as Python's int.

    Raises:
        InputError: it is anything else.
    """
    number = as_number(value)
    if not isinstance(number, int) or number < 1:
        raise InputError(f"{name}: expected an integer from 1, got {_got(value, number)}")
    if number > LARGEST_COUNT:
        raise InputError(f"{name}: expected an integer from 1 to 2^63 - 1, got {_got(value, number)}")
    return number


def check_number(name: str, value: Any, expected: str, fits: Callable[[float], bool]) -> int | float:
    """A number of Python or NumPy or a 0-d tensor or array, as Python's int or float. NaN never fits.

    Raises:
        InputError: it is anything else, or ``fits`` refuses it.
    """
    number = as_number(value)
    try:
        good = number is not None and not math.isnan(number) and fits(float(number))
    except OverflowError:  # an integer beyond all floats
        raise InputError(f"{name}: expected {expected}, got what no float holds") from None
    except RuntimeError:  # a complex tensor, or one without values
        good = False
    if number is None or not good:
        raise InputError(f"{name}: expected {expected}, got {_got(value, number)}")
    return number


def check_finite(name: str, value: Any) -> int | float:
    """A finite number from 0."""
    return check_number(name, value, "a finite number from 0", lambda x: 0.0 <= x < math.inf)


def check_seed(name: str, value: Any) -> int:
    """An integer that ``torch.manual_seed`` takes, as Python's int."""
    number = as_number(value)
    if not isinstance(number, int) or not -(2**63) <= number < 2**64:
        raise InputError(f"{name}: expected an integer from -2^63 to 2^64 - 1, got {_got(value, number)}")
    return number


def _got(value: Any, number: int | float | None) -> str:
    """A value that does not fit: as a number where it is one."""
    return describe(value if number is None else number)


# --- Objects ------------------------------------------------------------------------------------------------


def describe(value: Any) -> str:
    """What an argument is, for the end of a sentence: its type, and what else tells one mistake from another."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        bits = int(value).bit_length()
        return str(int(value)) if bits <= 128 else f"an integer of {bits} bits"  # Python prints no thousands of digits
    if value is None or isinstance(value, (bool, numbers.Number)):
        return repr(value)
    if isinstance(value, str):
        return repr(value if len(value) <= _LONGEST else value[: _LONGEST - 3] + "...")
    if isinstance(value, os.PathLike):
        return f"the path {os.fspath(value)!r}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Tensor):
        if value.is_nested:
            return f"a nested {value.dtype} tensor"
        layout = "" if value.layout == torch.strided else f" of layout {value.layout}"
        return f"a {value.dtype} tensor of shape {list(value.shape)}{layout}{' on the meta device' * value.is_meta}"
    if type(value).__module__ == "numpy" and hasattr(value, "dtype"):
        if not value.ndim:
            return repr(value)
        return f"a numpy.{type(value).__name__} of {value.dtype} and shape {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {_listed(value)}" if value else f"an empty {type(value).__name__}"
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        kinds = sorted({type(part).__name__ for part in value})
        return f"a {kind} of {len(value)} {' and '.join(kinds[:3])}" if value else f"an empty {kind}"
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def is_dense(value: Any) -> bool:
    """Whether it is a tensor that has a value in every place."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_nested or value.is_meta)


def _listed(names: Iterable[Any], limit: int = 8) -> str:
    texts = [str(name) for name in names]
    return ", ".join(texts[:limit]) + (f" and {len(texts) - limit} more" if len(texts) > limit else "")


def nearest(name: str, known: Mapping[str, str] | Iterable[str]) -> str | None:
    """The known name that was probably meant, whatever its case and hyphens; of a mapping, what it stands for."""
    plain = {_plain(key): (known[key] if isinstance(known, Mapping) else key) for key in known}
    near = difflib.get_close_matches(_plain(name)[:_LONGEST], plain, n=1)
    return plain[near[0]] if near else None


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises InputError unless ``value`` is one of ``choices``; it may be a list, which has no hash."""
    choices = [*choices]
    if value not in choices:
        raise InputError(f"{name}: expected one of {', '.join(choices)}, got {describe(value)}")


def check_instance(name: str, value: Any, kind: type, example: str) -> None:
    """Raises InputError unless ``value`` is an instance of ``kind``; a class is told to be called."""
    if isinstance(value, kind):
        return
    if isinstance(value, type) and issubclass(value, kind):
        raise InputError(f"{name}: got the class {value.__name__} and not an instance: pass {value.__name__}(...)")
    raise InputError(f"{name}: expected a {kind.__name__}, such as {example}, got {describe(value)}")


def check_model(model: Any, name: str = "model") -> None:
    """Raises InputError, which says what to do, unless ``model`` is a torch.nn.Module."""
    if isinstance(model, nn.Module):
        return
    got = describe(model)
    if isinstance(model, (str, os.PathLike)):
        remedy = "open the file or folder, and pass the network that it holds"
    elif isinstance(model, type) and issubclass(model, nn.Module):
        remedy = "make one, and load its trained weights"
    elif isinstance(model, Mapping) and model and all(isinstance(part, Tensor) for part in model.values()):
        got = f"a state_dict of {len(model)} tensors"
        remedy = "build the network, call its load_state_dict with this, and pass the network"
    else:
        parts = [part for part in ("unet", "transformer", "model") if isinstance(getattr(model, part, None), nn.Module)]
        remedy = f"pass its .{parts[0]}" if parts else "pass the network itself"
    raise InputError(f"{name}: expected a torch.nn.Module, got {got}: {remedy}")


def check_device(device: Any, name: str = "device", kinds: Sequence[str] | None = None) -> torch.device:
    """The device, which is there and can hold a model.

    Args:
        kinds: those that will do; all that hold numbers unless given.

    Raises:
        InputError: there is none of that name, or this torch cannot use it.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        found = None
    if found is None or (kinds is not None and found.type not in kinds):
        raise InputError(f"{name}: expected one such as 'cpu', 'cuda' or 'cuda:0', got {describe(device)}")
    if found.type == "meta":
        raise InputError(f"{name}: 'meta' holds no numbers: choose cpu, cuda or another device that does")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{name}: this torch sees no GPU, so {str(found)!r} cannot be used: choose 'cpu'")
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise InputError(f"{name}: expected an index below {count}, the number of GPUs that torch sees, got {found}")
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ImportError):
        raise InputError(f"{name}: this torch cannot use {str(found)!r}: choose 'cpu'") from None
    return found
