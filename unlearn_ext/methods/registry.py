"""Methods by name: the built-in ones, and those of other packages through entry points."""

from __future__ import annotations

import functools
import warnings
from importlib.metadata import EntryPoint, entry_points

from ..errors import InputError, first_line
from ..utils.arguments import describe, nearest
from .bad_teacher import BadTeacher
from .base import Method
from .esd import ESD
from .finetune import Finetune
from .gradient_ascent import GradientAscent
from .nabla_tau import NablaTau
from .negative_gradient import NegativeGradientPlus, Projected
from .random_label import RandomLabel, SalUn
from .row import Row
from .scrub import Scrub
from .sfron import SFRon
from .ug_clu import UGCLU

__all__ = ["GROUP", "METHODS", "available", "find"]

# Names that are looked for here, and stand elsewhere.
_ELSEWHERE = {
    "retrain": "is no method but the reference of unlearn-ext compare, which trains it: leave it out",
    "ssd": "makes no gradient step: use unlearn_ext.methods.ssd.SSD, or unlearn-ext compare --methods ssd",
    "descent_to_delete": "is for one convex model, with a proof, and stands apart: the README says where",
    "mini_unlearning": "is left out: its formula has not been published where it could be read",
}

# A package adds a method by an entry point of this group, whose name is the method's own.
GROUP = "unlearn_ext.methods"

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Finetune,
        GradientAscent,
        NegativeGradientPlus,
        Projected,
        RandomLabel,
        SalUn,
        Scrub,
        BadTeacher,
        NablaTau,
        SFRon,
        UGCLU,
        ESD,
    )
}


def find(name: str) -> type[Method]:
    """The method of that name: a built-in one, or another package's.

    Raises:
        InputError: there is none, two packages have one, or a package's cannot be used.
    """
    if name not in METHODS and name not in _entries():
        _entries.cache_clear()  # a package may have been installed since
    entries = _entries().get(name, [])
    if name in METHODS:
        if entries:
            warnings.warn(_clash(name, entries), stacklevel=2)
        return METHODS[name]
    if len(entries) > 1:
        raise InputError(_clash(name, entries))
    if entries:
        return _load(entries[0])
    if name in _ELSEWHERE:
        raise InputError(f"{name} {_ELSEWHERE[name]}")
    known = [*METHODS, *(own for own in _entries() if own not in METHODS)]
    classes = {method.__name__: key for key, method in METHODS.items()}  # the name of a class is tried, too
    near = nearest(name, {**classes, **{own: own for own in known}})
    hint = f", perhaps {near} is meant" if near else ""
    raise InputError(f"there is no method {describe(name)}{hint}: choose from {', '.join(known)}")


def available() -> tuple[dict[str, type[Method]], list[str]]:
    """All methods that can be used, and one sentence for each entry point that cannot."""
    _entries.cache_clear()
    methods, problems = dict(METHODS), []
    for name, entries in _entries().items():
        if name in METHODS or len(entries) > 1:
            problems.append(_clash(name, entries))
            continue
        try:
            methods[name] = _load(entries[0])
        except InputError as error:
            problems.append(str(error))
    return methods, problems


@functools.cache
def _entries() -> dict[str, list[EntryPoint]]:
    """By name. A package that is installed twice is one package. Kept, since a look at all installed packages takes
    longer than what :func:`find` is asked for."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        own = found.setdefault(entry.name, [])
        if all((entry.value, _package(entry)) != (other.value, _package(other)) for other in own):
            own.append(entry)
    return found


def _load(entry: EntryPoint) -> type[Method]:
    where = f"the method {entry.name} of {_package(entry)}"
    try:
        method = entry.load()
    except Exception as error:  # whatever that package does
        raise InputError(
            f"{where} cannot be loaded ({type(error).__name__}: {first_line(error)}): mend or remove that package"
        ) from None
    if not isinstance(method, type) or not issubclass(method, Method):
        raise InputError(f"{where} is no subclass of unlearn_ext.methods.Method: {entry.value} has to name one")
    if getattr(method, "name", None) != entry.name or not isinstance(getattr(method, "row", None), Row):
        raise InputError(f"{where} has to have name = {entry.name!r} and a row, which the table of methods prints")
    return method


def _clash(name: str, entries: list[EntryPoint]) -> str:
    packages = " and ".join(sorted(map(_package, entries)))
    if name in METHODS:
        return f"{packages} has a method called {name}, as a built-in one is, which is used: rename or remove it"
    return f"{packages} each have a method called {name}: remove one of them"


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value
