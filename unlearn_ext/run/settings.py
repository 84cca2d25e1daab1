"""Settings in words: what a run must have in common with the one that it resumes, where it is no number or text."""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..distributed.hashing import weights_hash
from ..distributed.wrappers import unwrapped
from ..utils.plain import plain_numbers
from .packing import is_plain

__all__ = ["in_words", "of_task"]

_DEEPEST = 4  # of objects in objects
_LONGEST = 200  # characters
_LOGS = (list, dict, set)  # what functions keep in these grows in a run, as a rule


def of_task(task: Any) -> dict[str, Any]:
    """The task's class, and the arguments that it was made with and keeps under their names."""
    return {"task": type(task).__name__, **{f"task.{name}": _setting(v) for name, v in _arguments(task).items()}}


def _setting(value: Any) -> Any:
    if value is None:
        return None
    number = None if isinstance(value, (list, tuple, dict)) else plain_numbers(value)
    return number if isinstance(number, (bool, int, float, str)) else _cut(in_words(value))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... {_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=6).hexdigest()


def in_words(value: Any, depth: int = 0) -> str:
    """What a value is, the same in every process that makes it in the same way.

    A function is its module, name, defaults and what it encloses, not its code; a lambda, which has no name, its code
    too. An object is its class and the arguments that it was made with and keeps under their names. Tensors are a
    hash.
    """
    if not isinstance(value, (list, tuple, dict)):
        value = plain_numbers(value)
    if value is None or isinstance(value, (bool, int, float, str, bytes, Path, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, enum.Enum):
        return f"{_name(type(value))}.{value.name}"
    if isinstance(value, nn.Module):
        value = unwrapped(value)
    if isinstance(value, types.FunctionType):
        value = inspect.unwrap(value)
    if depth > _DEEPEST:
        return _name(type(value))
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        return f"tensor {weights_hash([('', value)])[:12]}" if is_plain(value) else "tensor"
    words = functools.partial(in_words, depth=depth + 1)
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = map(words, value) if isinstance(value, (list, tuple)) else sorted(map(words, value))
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, Mapping):
        return _call("dict" if isinstance(value, types.MappingProxyType) else _name(type(value)), [], value, words)
    if isinstance(value, functools.partial):
        return _call("partial", [value.func, *value.args], value.keywords, words)
    if isinstance(value, types.MethodType):
        return f"{words(value.__self__)}.{value.__name__}"
    if isinstance(value, types.FunctionType):
        return _function(value, words)
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return _name(value)
    return _call(_name(type(value)), [], _arguments(value), words)


def _call(name: str, values: list[Any], named: Mapping[Any, Any], words: Any) -> str:
    parts = [*map(words, values), *(f"{key}={words(value)}" for key, value in named.items())]
    return f"{name}({', '.join(parts)})"


def _function(function: types.FunctionType, words: Any) -> str:
    name, defaults = _name(function), [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    values = [value for value in defaults if not isinstance(value, _LOGS)]
    if function.__name__ == "<lambda>":
        name += f" {_digest(_code(function.__code__))}"
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    enclosed = {}
    for key, cell in cells.items():
        try:
            enclosed[key] = cell.cell_contents
        except ValueError:  # empty yet
            continue
    enclosed = {key: value for key, value in enclosed.items() if not isinstance(value, _LOGS)}
    return _call(name, values, enclosed, words) if values or enclosed else name


def _code(value: Any) -> str:
    """Of code and its constants."""
    if isinstance(value, types.CodeType):
        return f"{value.co_code.hex()} {value.co_names} {[_code(constant) for constant in value.co_consts]}"
    return f"{sorted(map(repr, value))}" if isinstance(value, frozenset) else repr(value)


def _name(value: Any) -> str:
    module = getattr(value, "__module__", None) or ""
    if module in ("__main__", "__mp_main__"):  # the script, which another may import by its name
        main = sys.modules["__main__"]
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        module = spec.name if spec is not None else Path(file).stem if file else ""
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return name if module in ("", "builtins") else f"{module}.{name}"


def _arguments(value: Any) -> dict[str, Any]:
    """Those that the object's class was called with, as far as the object keeps them under their names: what else it
    keeps may change in a run."""
    names: dict[str, None] = {}
    for kind in type(value).__mro__[:-1]:
        if isinstance(function := vars(kind).get("__init__"), types.FunctionType):
            names |= dict.fromkeys(inspect.signature(function).parameters)
    attributes = dict(getattr(value, "__dict__", {}))
    for registered in ("_buffers", "_parameters", "_modules") if isinstance(value, nn.Module) else ():
        attributes |= attributes[registered]
    slots = {name for name in names if isinstance(getattr(type(value), name, None), types.MemberDescriptorType)}
    return {name: attributes.get(name, getattr(value, name, None)) for name in names if name in {*attributes, *slots}}
