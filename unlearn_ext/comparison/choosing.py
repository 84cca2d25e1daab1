"""From ``--methods sfron,sfron:forget_alpha=auto,salun`` to what is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from ..methods import available, find, parse
from ..methods.calibration import AUTO
from ..methods.spec import read_settings, split_commas, split_spec
from ..methods.ssd import SSD
from ..methods.tuned import tuned_settings
from ..tasks import Classification
from .runners import DampeningRunner, MethodRunner, Runner

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
    methods: list[str] = []
    for piece in filter(None, map(str.strip, split_commas(text))):
        if "=" in piece.partition(":")[0] and methods:
            methods[-1] += f",{piece}"
        else:
            methods.append(piece)
    return methods


def choose(texts: Sequence[str], settings: str, scenario: str) -> list[Runner]:
    """A runner for each ``name``, ``name:key=value,...`` or ``name@preset``; what is given there goes before all else.

    Args:
        texts: what :func:`split_list` gave; ``all``: each method that can be compared.
        settings: ``published``: the published ones, or the defaults of a method that has none; ``tuned``: those of
            :func:`~unlearn_ext.methods.tuned.tuned_settings` for the most of what the text gives, and the published
            ones where it has none.
        scenario: ``random`` or ``class``, for which the settings were tuned.

    Raises:
        InputError: an unknown method, or settings that it does not take.
    """
    if settings not in SETTINGS:
        raise InputError(f"--settings: expected {' or '.join(SETTINGS)}, got {settings!r}")
    named = [name for text in texts for name in (_comparable() if text == ALL else [text])]
    return [_runner(text, tuned_settings(scenario) if settings == "tuned" else {}, scenario) for text in named]


def _comparable() -> list[str]:
    """Methods that run on a classifier and take no data that a comparison has not."""
    methods = available()[0].items()
    return [name for name, kind in methods if Classification.kind in kind.row.tasks and not kind.learns] + [SSD.name]


def complete(text: str, settings: Mapping[str, Any]) -> str:
    """The text with its method's published preset, if it names none, and with the settings that it does not give."""
    name, preset, rest = split_spec(text)
    presets = _presets(name)
    if not preset and PUBLISHED in presets:
        preset = PUBLISHED
    pieces = split_commas(rest)
    keys = set(map(_key, pieces))
    if "iterations" in keys and "epochs" not in keys and presets.get(preset, {}).get("epochs") is not None:
        settings = {**settings, "epochs": None}  # which would go before what is given
    pieces += [f"{key}={'none' if value is None else value}" for key, value in settings.items() if key not in keys]
    head = f"{name}@{preset}" if preset else name
    return f"{head}:{','.join(pieces)}" if pieces else head


def _runner(text: str, tuned: Mapping[str, Mapping[str, Any]], scenario: str) -> Runner:
    name, preset, rest = split_spec(text)
    if name == SSD.name and preset:
        raise InputError(f"{name} has no presets: leave @{preset} out")
    kind = _kind(name)
    explicit = read_settings(name, kind, rest)
    nearest = None if preset else _nearest(name, kind, explicit, tuned)
    origin, known = preset or ("published" if PUBLISHED in _presets(name) else "defaults"), {}
    if nearest is not None:
        origin, known = "tuned", read_settings(name, kind, split_spec(nearest)[2])
    if further := [piece.strip() for piece in split_commas(rest) if _key(piece) not in known]:
        origin += f", with {','.join(further)}"
    whole = complete(text, {} if nearest is None else tuned[nearest])
    if kind is SSD:  # not of the registry, whose methods make gradient steps
        return DampeningRunner(text, SSD(**read_settings(name, SSD, split_spec(whole)[2])), origin)
    method = parse(whole)
    if scenario == "class" and method.calibration is not None and method.target_accuracy is None:
        method = parse(complete(whole, {"target_accuracy": 0.0}))  # unseen samples of that class are not to be matched
    return MethodRunner(text, method, origin, own_seed="seed" in explicit)


def _nearest(name: str, kind: type, explicit: Mapping[str, Any], tuned: Mapping[str, Any]) -> str | None:
    """The key of the tuned settings for the most of what is given, and for nothing that is not.

    Calibrated forgetting is another rule, which settings of the uncalibrated one do not suit.
    """
    lengths: dict[str, int] = {}
    for key in tuned:
        of, preset, rest = split_spec(key)
        if of != name or preset:
            continue
        settings = read_settings(name, kind, rest)
        if explicit.get("forget_alpha") == AUTO and settings.get("forget_alpha") != AUTO:
            continue
        if settings.items() <= explicit.items():
            lengths[key] = len(settings)
    return max(lengths, key=lengths.__getitem__, default=None)


def _kind(name: str) -> type:
    return SSD if name == SSD.name else find(name)


def _presets(name: str) -> Mapping[str, Mapping[str, Any]]:
    return getattr(_kind(name), "presets", {})


def _key(piece: str) -> str:
    """Of ``key=value``."""
    return piece.partition("=")[0].strip()
