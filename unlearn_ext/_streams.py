"""Endless batches from a re-iterable, at a position that can be saved."""

from __future__ import annotations

import contextlib
import inspect
import operator
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from . import _rng
from ._ranks import ALONE, Ranks
from .errors import InputError

__all__ = ["BatchStream", "empty_set", "in_step", "is_spent", "length", "no_batches"]


def length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:  # no length, or a DataLoader of an IterableDataset without one
        return None


def empty_set(name: str, data: Iterable[Any], again: bool = False) -> InputError:
    """What to do about a data set that gives no batch; ``again``: it has given some in an earlier pass."""
    if again:
        return InputError(
            f"the {name} set is empty in its second pass: it can be iterated once only, and several passes are needed; "
            "pass a list of batches or a DataLoader"
        )
    return InputError(f"the {name} set is empty" + (no_batches(data) or ": pass at least one batch"))


def no_batches(data: Iterable[Any]) -> str:
    """The end of a sentence about data that give no batch: what a loader drops; empty where it drops nothing."""
    batch_sampler = getattr(data, "batch_sampler", None)
    for owner in (batch_sampler, data):
        size = getattr(owner, "batch_size", None)
        if getattr(owner, "drop_last", False) and size is not None:
            count = length(getattr(batch_sampler, "sampler", None))
            what = f"its {count} samples do" if count else "its samples do"
            return f": {what} not fill a batch of {size}, and drop_last=True: lower batch_size, or set drop_last=False"
    return ""


def is_spent(data: Iterable[Any]) -> bool:
    """Whether a pass has used up an iterator that the data keep and iterate over, so that another pass is empty. Data
    that keep no iterator at its end are not touched."""
    owner = data.dataset if isinstance(data, DataLoader) else data
    if not isinstance(owner, IterableDataset) and hasattr(owner, "__getitem__"):
        return False
    iterators = [value for value in getattr(owner, "__dict__", {}).values() if isinstance(value, Iterator)]
    if not any(_has_ended(value) or iter(owner) is value for value in iterators):
        return False
    with _rng.kept(_rng.generators_of(owner)):
        return next(iter(owner), _END) is _END


def _has_ended(iterator: Iterator[Any]) -> bool:
    """Told without taking anything; False where that cannot be."""
    if isinstance(iterator, types.GeneratorType):
        return inspect.getgeneratorstate(iterator) == inspect.GEN_CLOSED
    return operator.length_hint(iterator, 1) == 0


@contextlib.contextmanager
def _as_first(data: Iterable[Any], ranks: Ranks) -> Iterator[dict[str, Any]]:
    """A pass that starts in the block is the first rank's: its shuffling too, which may draw from the global generator.
    Gives the state of all generators at that start."""
    generators = _rng.generators_of(data)
    own = None if ranks.first else _rng.capture()
    state = ranks.from_first(_rng.capture(generators))
    if own is not None:
        _rng.restore(state, generators)
    try:
        yield state
    finally:
        if own is not None:  # what modules draw stays this rank's
            _rng.restore(own)


def in_step(data: Iterable[Any], ranks: Ranks) -> Iterator[Any]:
    """One pass, in the first rank's order."""
    with _as_first(data, ranks):
        iterator = iter(data)
        batch = next(iterator, _END)
    while batch is not _END:
        yield batch
        batch = next(iterator, _END)


_END = object()


class BatchStream:
    """Batches of one data set, iterated again with ``iter()`` when it ends and never stored.

    A DataLoader shuffles anew each time. The position is the state of all generators at the last start and the
    number of batches taken since: a resumed stream starts from the one and skips the other. ``ranks`` are those that
    take the same batches.
    """

    def __init__(self, name: str, data: Iterable[Any], ranks: Ranks = ALONE):
        if not hasattr(data, "__iter__"):
            raise InputError(f"the {name} set is no iterable of batches but a {type(data).__name__}: pass a DataLoader")
        if isinstance(data, Iterator):
            raise InputError(
                f"the {name} set is a one-shot iterator, and several passes are needed: pass a list or a DataLoader"
            )
        self.name, self.data, self.ranks = name, data, ranks
        self._iterator: Iterator[Any] | None = None
        self._start_state: dict[str, Any] | None = None
        self._taken = 0

    def take(self) -> Any:
        if self._iterator is not None:
            try:
                batch = next(self._iterator)
            except StopIteration:
                pass
            else:
                self._taken += 1
                return batch
        # A sampler may draw its seed at iter() or at the first batch: the two stand together, here and in seek().
        with _as_first(self.data, self.ranks) as self._start_state:
            self._iterator = iter(self.data)
            try:
                batch = next(self._iterator)
            except StopIteration:
                raise empty_set(self.name, self.data, again=True) from None
        self._taken = 1
        return batch

    def position(self) -> dict[str, Any] | None:
        return None if self._iterator is None else {"start": self._start_state, "taken": self._taken}

    def check(self, position: dict[str, Any] | None, batches: int | None) -> None:
        """Whether the data can be that of a saved position; ``batches`` is its length then."""
        if batches != length(self.data):
            raise InputError(
                f"the {self.name} set had {batches} batches when the checkpoint was made and has {length(self.data)} "
                "now: pass the same data"
            )
        if position is not None:
            _rng.check(position["start"], _rng.generators_of(self.data))

    def seek(self, position: dict[str, Any] | None) -> None:
        """Moves to a saved position. The caller restores all generators afterwards."""
        if position is None:
            return
        _rng.restore(position["start"], _rng.generators_of(self.data))
        self._start_state, self._taken = position["start"], position["taken"]
        self._iterator = iter(self.data)
        for _ in range(self._taken):
            if next(self._iterator, None) is None:
                raise InputError(
                    f"the {self.name} set is shorter than when the checkpoint was made: pass the same data"
                )
