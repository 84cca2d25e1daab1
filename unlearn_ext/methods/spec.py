"""Methods as text: ``sfron``, ``sfron:forget_alpha=50,gamma=none``, ``sfron@cifar10-resnet18:iterations=300``."""

from __future__ import annotations

import ast
import difflib
import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..errors import InputError
from ..utils.arguments import check_instance, describe
from .base import Method
from .registry import find
from .ssd import SSD

__all__ = ["find_method", "parse", "read_settings", "split_commas", "split_spec"]

_WORDS = {"true": True, "false": False, "none": None, "null": None}


def parse(spec: str, **defaults: Any) -> Method:
    """A method from ``name[@preset][:key=value,...]``.

    Values are numbers, ``true``, ``false``, ``none``, words, or tuples and dicts as Python writes them
    (``betas=(0.9,0.99)``).

    Args:
        spec: the text.
        defaults: settings that hold where neither the preset nor the text says otherwise.

    Raises:
        InputError: an unknown name, preset or key, or a value that does not fit.
    """
    if not isinstance(spec, str):
        raise InputError(f"a method is given as text, such as 'sfron', got {describe(spec)}")
    name, preset, rest = split_spec(spec)
    method = find(name)
    given = read_settings(name, method, rest)
    kinds = _kinds(method)
    known = {key: value for key, value in defaults.items() if key in kinds}
    if not preset:
        return method(**{**known, **given})
    of_preset = method.presets.get(preset, {})
    return method.preset(preset, **{**{k: v for k, v in known.items() if k not in of_preset}, **given})


def find_method(method: Method | str) -> Method:
    """A method as it is, or :func:`parse` of a text.

    Raises:
        InputError: it is neither, such as a method's class; says what to pass.
    """
    if isinstance(method, str):
        return parse(method)
    if isinstance(method, SSD) or (isinstance(method, type) and issubclass(method, SSD)):
        raise InputError("method: SSD makes no gradient step: call SSD().run(model, task, forget, retain)")
    check_instance("method", method, Method, "SFRon() or its name 'sfron'")
    return method


def split_spec(spec: str) -> tuple[str, str, str]:
    """Name, preset and settings of ``name[@preset][:key=value,...]``, the last two empty where there are none.

    Raises:
        InputError: a part that is begun is missing.
    """
    head, colon, rest = spec.strip().partition(":")
    name, at, preset = (part.strip() for part in head.partition("@"))
    if not name:
        raise InputError(f"a method is name, name@preset or name:key=value,key=value; got {describe(spec)}")
    for text, sign, follows, missing in (
        (head.strip(), at, preset, "a preset"),
        (spec.strip(), colon, rest.strip(), "settings"),
    ):
        if sign and not follows:
            raise InputError(f"{describe(text)} ends where {missing} should follow: leave {sign} out")
    return name, preset, rest.strip()


def read_settings(name: str, kind: type, text: str) -> dict[str, Any]:
    """Arguments of a dataclass, which errors call ``name``, from ``key=value,...``, as :func:`parse` reads them."""
    kinds = _kinds(kind)
    given: dict[str, Any] = {}
    for part in split_commas(text):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value:
            raise InputError(f"{name}: expected key=value between commas, got {describe(part.strip())}")
        if key in given:
            raise InputError(f"{name}: {key} is given twice")
        given[key] = _value(name, key, value, kinds)
    return given


def split_commas(text: str) -> list[str]:
    """What stands between commas outside of brackets, as it stands there; nothing of a text of blanks."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return parts if text.strip() else []


def _kinds(method: type) -> dict[str, Any]:
    """What each setting may be, by name; those that text can give."""
    hints = get_type_hints(method)
    return {field.name: hints[field.name] for field in fields(method) if field.init}


def _value(name: str, key: str, text: str, kinds: Mapping[str, Any]) -> Any:
    if key not in kinds:
        near = difflib.get_close_matches(key[:80], kinds, n=1)
        hint = f"perhaps {near[0]} is meant" if near else f"its settings are {', '.join(kinds)}"
        raise InputError(f"{name} has no setting {describe(key)}: {hint}")
    if text.lower() in _WORDS:
        value = _WORDS[text.lower()]
    else:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # a list as a key; too deep
            value = text
    if not _fits(value, kinds[key]):
        words = _in_words(kinds[key])
        raise InputError(
            f"{name}: {key} is {words}, got {describe(text)}"
            if words
            else f"{name}: {key} cannot be given as text: set it in Python"
        )
    return value


def _fits(value: Any, kind: Any) -> bool:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is types.NoneType or kind is None:
        return value is None
    return isinstance(value, origin or kind)


_NAMES = {float: "a number", int: "an integer", str: "a word", bool: "true or false", types.NoneType: "none"}


def _in_words(kind: Any) -> str:
    """Empty where no text is such a value."""
    if get_origin(kind) in (Union, types.UnionType):
        found = [words for words in map(_in_words, get_args(kind)) if words]
        return " or ".join(found) if found != ["none"] else ""
    plain = get_origin(kind) or kind
    return _NAMES.get(plain) or {tuple: "a tuple", dict: "a dict"}.get(plain, "")
