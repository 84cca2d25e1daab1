"""From ``--methods sfron,sfron:forget_alpha=auto,salun`` to what is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from ..methods import Method, SFRon
from .runners import MethodRunner, Runner
from .tuned import TUNED

__all__ = ["SETTINGS", "choose", "split_list"]

SETTINGS = ("tuned", "published")


def split_list(text: str) -> list[str]:
    """``a,b:x=1,y=(2,3),c`` -> ``a``, ``b:x=1,y=(2,3)``, ``c``: a comma begins a method unless a setting follows it.

    A method's name holds no ``=``, so that a piece like ``y=2`` belongs to the method before it. Commas in brackets and
    quotes part nothing.
    """
    pieces, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
        if character == "," and not quote and depth <= 0:
            pieces.append("")
        else:
            pieces[-1] += character
    found: list[str] = []
    for piece in map(str.strip, pieces):
        if "=" in piece.partition(":")[0] and found:
            found[-1] += f",{piece}"
        elif piece:
            found.append(piece)
    return found


def choose(texts: Sequence[str], settings: str, scenario: str) -> list[Runner]:
    """A runner for each ``name`` or ``name:key=value,...``; what is given there goes before tuned settings.

    Args:
        texts: what :func:`split_list` gave.
        settings: ``published``: a method's own defaults; ``tuned``: :data:`~unlearn_ext.comparison.tuned.TUNED`, where
            it has the method.
        scenario: ``random`` or ``class``, for which the settings were tuned.

    Raises:
        InputError: an unknown method, or settings that it does not take.
    """
    if settings not in SETTINGS:
        raise InputError(f"--settings: expected {' or '.join(SETTINGS)}, got {settings!r}")
    return [MethodRunner(text, *_method(text, TUNED[scenario] if settings == "tuned" else {})) for text in texts]


def _method(text: str, tuned: dict[str, dict[str, Any]]) -> tuple[Method, str]:
    name, _, rest = text.partition(":")
    if name != SFRon.name:
        raise InputError(f"--methods: there is no method {name!r}: choose from {SFRon.name}")
    given = dict(_setting(piece) for piece in split_list(f"x,{rest}")[0].split(",")[1:]) if rest else {}
    origin = "tuned" if name in tuned else "published"
    return SFRon(**{**tuned.get(name, SFRon.presets["cifar10-resnet18"]), **given}), origin


def _setting(piece: str) -> tuple[str, Any]:
    import ast

    key, _, value = piece.partition("=")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
