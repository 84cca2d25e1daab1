"""From ``--methods sfron,sfron:forget_alpha=auto,salun`` to what is run."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InputError
from ..methods import find, parse
from .runners import MethodRunner, Runner
from .tuned import TUNED

__all__ = ["PUBLISHED", "SETTINGS", "choose", "split_list"]

SETTINGS = ("tuned", "published")
# Of a method with presets: that of the published experiment which is nearest to this one. Of others: their defaults.
PUBLISHED = "cifar10-resnet18"


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
    """A runner for each ``name``, ``name:key=value,...`` or ``name@preset``; what is given there goes before all else.

    Args:
        texts: what :func:`split_list` gave.
        settings: ``published``, or ``tuned``: those of :data:`~unlearn_ext.comparison.tuned.TUNED` for the text or,
            where it has none, for the method of that name, and the published ones where it has none of either.
        scenario: ``random`` or ``class``, for which the settings were tuned.

    Raises:
        InputError: an unknown method, or settings that it does not take.
    """
    if settings not in SETTINGS:
        raise InputError(f"--settings: expected {' or '.join(SETTINGS)}, got {settings!r}")
    return [_runner(text, TUNED[scenario] if settings == "tuned" else {}) for text in texts]


def _runner(text: str, tuned: dict[str, dict[str, object]]) -> Runner:
    head, colon, rest = text.partition(":")
    name, at, preset = (part.strip() for part in head.partition("@"))
    found = tuned.get(text, tuned.get(name))
    if at:
        return MethodRunner(text, parse(text), preset)
    if found is not None:
        return MethodRunner(text, parse(text, **found), "tuned")
    if PUBLISHED in find(name).presets:
        text_of_preset = f"{name}@{PUBLISHED}{colon}{rest}"
        return MethodRunner(text, parse(text_of_preset), "published")
    return MethodRunner(text, parse(text), "published")
