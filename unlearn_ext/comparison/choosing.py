"""From ``--methods sfron,sfron:forget_alpha=auto,salun`` to what is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from ..methods import available, find, parse
from ..methods.spec import read_settings
from ..methods.ssd import SSD
from ..tasks import Classification
from .runners import DampeningRunner, MethodRunner, Runner
from .tuned import TUNED

__all__ = ["PUBLISHED", "SETTINGS", "choose", "complete", "split_list"]

SETTINGS = ("tuned", "published")
# Of a method with presets: that of the published experiment which is nearest to this one. Of others: their defaults.
PUBLISHED = "cifar10-resnet18"
ALL = "all"


def split_list(text: str) -> list[str]:
    """``a,b:x=1,y=(2,3),c`` -> ``a``, ``b:x=1,y=(2,3)``, ``c``: a comma begins a method unless a setting follows it.

    A method's name holds no ``=``, so that a piece like ``y=2`` belongs to the method before it. Commas in brackets
    part nothing.
    """
    found: list[str] = []
    for piece in _pieces(text):
        if "=" in piece.partition(":")[0] and found:
            found[-1] += f",{piece}"
        else:
            found.append(piece)
    return found


def choose(texts: Sequence[str], settings: str, scenario: str) -> list[Runner]:
    """A runner for each ``name``, ``name:key=value,...`` or ``name@preset``; what is given there goes before all else.

    Args:
        texts: what :func:`split_list` gave; ``all``: each method that can be compared.
        settings: ``published``, or ``tuned``: those of :data:`~unlearn_ext.comparison.tuned.TUNED` for the text or,
            where it has none, for the method of that name, and the published ones where it has none of either.
        scenario: ``random`` or ``class``, for which the settings were tuned.

    Raises:
        InputError: an unknown method, or settings that it does not take.
    """
    if settings not in SETTINGS:
        raise InputError(f"--settings: expected {' or '.join(SETTINGS)}, got {settings!r}")
    named = [name for text in texts for name in (_comparable() if text == ALL else [text])]
    return [_runner(text, TUNED[scenario] if settings == "tuned" else {}, scenario) for text in named]


def _comparable() -> list[str]:
    """Methods that run on a classifier and take no data that a comparison has not."""
    methods = available()[0].items()
    return [name for name, kind in methods if Classification.kind in kind.row.tasks and not kind.learns] + [SSD.name]


def complete(text: str, settings: Mapping[str, Any]) -> str:
    """The text with its method's published preset, if it names none, and with the settings that it does not give."""
    head, colon, rest = text.partition(":")
    name, _, preset = (part.strip() for part in head.partition("@"))
    if colon and not rest.strip():
        return text  # an error that parse() words
    presets = {} if name == SSD.name else find(name).presets
    if not preset and PUBLISHED in presets:
        head = f"{name}@{(preset := PUBLISHED)}"
    given = _pieces(rest)
    keys = {piece.partition("=")[0].strip() for piece in given}
    if "iterations" in keys and "epochs" not in keys and presets.get(preset, {}).get("epochs") is not None:
        settings = {**settings, "epochs": None}  # which would go before what is given
    given += [f"{key}={'none' if value is None else value}" for key, value in settings.items() if key not in keys]
    return f"{head}:{','.join(given)}" if given else head


def _runner(text: str, tuned: Mapping[str, Mapping[str, Any]], scenario: str) -> Runner:
    head = text.partition(":")[0]
    name, _, preset = (part.strip() for part in head.partition("@"))
    found = None if preset else tuned.get(text, tuned.get(name))
    origin = preset or ("published" if found is None else "tuned")
    whole = complete(text, found or {})
    if head.strip() == SSD.name:  # not of the registry, whose methods make gradient steps
        return DampeningRunner(text, SSD(**read_settings(SSD.name, SSD, whole.partition(":")[2])), origin)
    method = parse(whole)
    if scenario == "class" and getattr(method, "calibration", None) is not None and method.target_accuracy is None:
        method = parse(complete(whole, {"target_accuracy": 0.0}))  # unseen digits of that class are not to be matched
    return MethodRunner(text, method, origin)


def _pieces(text: str) -> list[str]:
    """What stands between commas outside of brackets, without empty ones."""
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces if piece.strip()]
