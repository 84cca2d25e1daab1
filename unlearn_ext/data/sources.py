"""What data draw from beside the global generators: generators, epochs and counters that a loader can reach."""

from __future__ import annotations

import itertools
import random
import types
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.quasirandom import SobolEngine
from torch.utils.data import DataLoader, IterableDataset, IterDataPipe, Sampler

__all__ = ["Sources", "epoch_of"]

_OTHERS = (np.random.Generator, np.random.RandomState, np.random.BitGenerator, SobolEngine)
_PLAIN = (str, bytes, bytearray, int, float, complex, type(None), type, types.ModuleType, types.BuiltinFunctionType)
_PLAIN += (torch.Tensor, torch.dtype, torch.device, np.ndarray, np.generic, Path)
_LIBRARIES = {"abc", "accelerate", "builtins", "collections", "diffusers", "functools", "numpy", "torch", "torchvision"}
_LIBRARIES |= {"tokenizers", "transformers", "types", "typing", "unlearn_ext"}  # without generators of their classes
_ITEMS = 1000  # of a list or dict that are looked at: a generator stands among the first, samples are many
_OBJECTS = 20_000  # that are looked at below each root
_OF_MODULES = set(vars(nn.Module())) - {"_modules", "_forward_hooks", "_forward_pre_hooks"}
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_DATA = {"data", "forget", "retain", "learn", "unseen"}  # roots
_NO_STATE = {"_iterator", "multiprocessing_context"}  # of a loader: the workers of its last pass


def is_generator(value: Any) -> bool:
    """Whether its state can be saved; random.SystemRandom has none."""
    numbers = isinstance(value, random.Random) and not isinstance(value, random.SystemRandom)
    return numbers or isinstance(value, (torch.Generator, *_OTHERS))


def epoch_of(value: Any) -> int | None:
    """The epoch that ``set_epoch`` has set, or None where the object does not show it."""
    for name in ("epoch", "_epoch", "iteration"):  # the last is accelerate's
        try:
            return int(getattr(value, name))
        except (AttributeError, TypeError, ValueError, RuntimeError):
            continue
    return None


class Sources:
    """The generators, epochs and counters below some objects, by path.

    A path is a name of ``roots`` and the attributes and items that lead on from it: ``retain.sampler.generator``. Those
    of a function are its closure, its defaults and the generators among its globals. Made anew for every look: data
    sets and samplers make generators when they first need one.

    Attributes:
        generators: with all paths that lead to each.
        epochs: objects with ``set_epoch``, outer ones first.
        counters: samplers, and of the user's classes what data are iterated through (loaders, streamed data sets), the
            task and what it holds: their numbers (an epoch, a seed, a position, a step of an annealed loss) decide what
            comes too. Not data sets that are indexed: a number there may say which part is in a cache, and would not
            fit it any more.
        samplers: which of the paths of ``counters`` lead to a sampler.
        stateful: objects of the users' with ``state_dict`` and ``load_state_dict``, as torchdata asks for them.
        objects: everything that was looked at.
    """

    def __init__(self, roots: Mapping[str, Any]):
        self.generators: list[tuple[list[str], Any]] = []
        self.epochs: dict[str, Any] = {}
        self.counters: dict[str, Any] = {}
        self.samplers: set[str] = set()
        self.stateful: dict[str, Any] = {}
        self.objects: dict[str, Any] = {}
        self._seen: dict[int, list[str] | None] = {}  # of a generator, its paths
        self._classes: set[type] = set()
        for root in roots.items():
            waiting, end = deque([root]), len(self.objects) + _OBJECTS
            while waiting and len(self.objects) < end:
                path, value = waiting.popleft()
                if self._visit(path, value):
                    below = self._children(path, value)
                    waiting.extend((path, item) for path, item in below if not _is_plain(item))

    def _visit(self, path: str, value: Any) -> bool:
        """Whether there is anything below it that has not been looked at."""
        if id(value) in self._seen:
            if (paths := self._seen[id(value)]) is not None:
                paths.append(path)
            return False
        if is_generator(value):
            paths = self._seen[id(value)] = [path]
            self.generators.append((paths, value))
            return False
        self._seen[id(value)] = None
        self.objects[path] = value
        if callable(getattr(type(value), "set_epoch", None)):
            self.epochs[path] = value
        users = _is_users(type(value).__module__) and not isinstance(value, nn.Module)
        stateful = all(callable(getattr(type(value), name, None)) for name in ("state_dict", "load_state_dict"))
        # A loader's state (torchdata's) is where its next pass begins, and streams replay passes by themselves.
        if users and stateful and not isinstance(value, DataLoader):
            self.stateful[path] = value
        of_task = path.partition(".")[0] == "task" and _is_users(type(value).__module__)
        below = path.partition(".")[0].partition("[")[0] in _DATA
        iterated = users and below and (path in _DATA or _is_iterated(type(value)))
        if samples := isinstance(value, Sampler) or path.rpartition(".")[2] in ("sampler", "batch_sampler"):
            self.samplers.add(path)
        if of_task or iterated or samples:
            self.counters[path] = value
        return True

    def _children(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, _CONTAINERS):
            for key, item in _items(value):
                yield f"{path}[{key}]", item
        elif isinstance(value, partial):
            yield from {f"{path}.func": value.func, f"{path}.args": value.args}.items()
            yield f"{path}.keywords", value.keywords
        elif isinstance(value, types.MethodType):
            yield from {f"{path}.__self__": value.__self__, f"{path}.__func__": value.__func__}.items()
        elif isinstance(value, types.FunctionType):
            yield from _of_function(path, value)
        for name, item in _attributes(value):
            yield f"{path}.{name}", item
        for kind in type(value).__mro__:
            if kind not in self._classes and _is_users(kind.__module__):
                self._classes.add(kind)
                yield from _of_class(path, kind)


def _is_plain(value: Any) -> bool:
    """Whether nothing can stand below it."""
    if isinstance(value, _CONTAINERS):
        return all(isinstance(item, _PLAIN) for _, item in _items(value))
    return isinstance(value, _PLAIN)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """By the container's own methods, which a subclass may have replaced."""
    if isinstance(value, dict):
        return itertools.islice(dict.items(value), _ITEMS)
    kind = next(kind for kind in _CONTAINERS if isinstance(value, kind))
    return enumerate(itertools.islice(kind.__iter__(value), _ITEMS))


def _is_users(module: str | None) -> bool:
    return (module or "").partition(".")[0] not in _LIBRARIES


def _is_iterated(kind: type) -> bool:
    """Whether objects give a pass for each ``iter()``. Torch's pipes count which of their iterators is valid."""
    indexed = hasattr(kind, "__getitem__") and not issubclass(kind, IterableDataset)
    return hasattr(kind, "__iter__") and not indexed and not issubclass(kind, (Iterator, IterDataPipe))


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Without calling anything of the object's: no property, no ``__getattr__``."""
    try:
        attributes = dict(vars(value))
    except Exception:  # without any, or of a class that answers for itself
        attributes = {}
    for kind in type(value).__mro__:
        for name, member in vars(kind).items() if _is_users(kind.__module__) else ():
            if isinstance(member, types.MemberDescriptorType):  # of __slots__
                try:
                    attributes[name] = member.__get__(value)
                except AttributeError:
                    continue
    hidden = _OF_MODULES if isinstance(value, nn.Module) else _NO_STATE
    return ((name, item) for name, item in attributes.items() if name not in hidden)


def _of_class(path: str, kind: type) -> Iterator[tuple[str, Any]]:
    """Generators that are attributes of the class, and those that its functions take from their module."""
    for name, member in vars(kind).items():
        member = getattr(member, "__func__", member)  # of static and class methods
        if is_generator(member):
            yield f"{path}.{name}", member
        elif isinstance(member, types.FunctionType):
            yield from _globals(member)


def _of_function(path: str, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        try:
            yield f"{path}.{name}", cell.cell_contents
        except ValueError:  # empty yet
            continue
    yield f"{path}.__defaults__", function.__defaults__
    yield f"{path}.__kwdefaults__", function.__kwdefaults__
    if _is_users(function.__module__):
        yield from _globals(function)


def _globals(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Generators of the module, and its functions, that the code names."""
    codes = [function.__code__]
    for code in codes:
        codes.extend(constant for constant in code.co_consts if isinstance(constant, types.CodeType))
        for name in code.co_names:
            item = function.__globals__.get(name)
            below = isinstance(item, types.FunctionType) and item.__module__ == function.__module__
            if is_generator(item) or below:
                yield f"{function.__module__}:{name}", item
