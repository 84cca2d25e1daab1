"""Endless batches from a re-iterable, at a position that can be saved."""

from __future__ import annotations

import contextlib
import inspect
import operator
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from ..distributed.ranks import ALONE, Ranks
from ..errors import InputError
from ..utils.arguments import describe
from . import rng
from .sources import Sources, epoch_of

__all__ = ["BatchStream", "check_iterable", "empty_set", "in_step", "is_spent", "keeps_workers", "length", "no_batches"]
__all__ += ["with_own_workers"]


def length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):  # no length, or a DataLoader of an IterableDataset without one
        return None


def check_iterable(name: str, data: Any) -> None:
    if not hasattr(data, "__iter__"):
        raise InputError(f"the {name} set is no iterable of batches but {describe(data)}: pass a DataLoader")


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
    with rng.kept({"data": owner}):
        return next(iter(owner), _END) is _END


def _has_ended(iterator: Iterator[Any]) -> bool:
    """Told without taking anything; False where that cannot be."""
    if isinstance(iterator, types.GeneratorType):
        return inspect.getgeneratorstate(iterator) == inspect.GEN_CLOSED
    return operator.length_hint(iterator, 1) == 0


def keeps_workers(data: Any) -> bool:
    """Whether a loader has workers that live on from pass to pass."""
    return bool(getattr(data, "persistent_workers", False)) and getattr(data, "num_workers", 0) > 0


def with_own_workers(data: Iterable[Any]) -> Iterable[Any]:
    """The loader itself, or a twin with workers of its own.

    A DataLoader with persistent workers has one iterator, which every ``iter()`` sets back: whoever looks at the loader
    during a pass would end that pass.
    """
    if not keeps_workers(data):
        return data
    twin = object.__new__(type(data))
    twin.__dict__.update(vars(data))
    twin.__dict__["_iterator"] = None
    if (base := vars(data).get("base_dataloader")) is not None:  # in accelerate's
        twin.__dict__["base_dataloader"] = with_own_workers(base)
    return twin


@contextlib.contextmanager
def _as_first(data: Iterable[Any], ranks: Ranks, sources: Sources | None = None) -> Iterator[dict[str, Any]]:
    """A pass that starts in the block is the first rank's: its shuffling too, which may draw from the global generator.
    Gives the state of all generators at that start; ``sources``: the data's, where they are known."""
    roots = {"data": data}
    rank_state = None if ranks.first else rng.capture()
    sources = Sources(roots) if sources is None else sources
    state = ranks.from_first(rng.capture(roots, sources))
    if rank_state is not None:
        # A sampler's numbers decide the order; those of a loader, such as its rank, stay this rank's.
        counters = {path: numbers for path, numbers in state["counters"].items() if path in sources.samplers}
        rng.restore({**state, "counters": counters, "states": {}}, roots)
    try:
        yield state
    finally:
        if rank_state is not None:  # what modules draw stays this rank's
            rng.restore(rank_state)


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

    A DataLoader shuffles anew each time, and what has ``set_epoch`` (a DistributedSampler, a loader of accelerate's, a
    data set) gets the next epoch before each pass but the first. The position is the state of all generators, epochs
    and counters at the last start and the number of batches taken since: a resumed stream starts from the one and skips
    the other. ``ranks`` are those that take the same batches.
    """

    def __init__(self, name: str, data: Iterable[Any], ranks: Ranks = ALONE):
        check_iterable(name, data)
        if isinstance(data, Iterator):
            raise InputError(
                f"the {name} set is a one-shot iterator, and several passes are needed: pass a list or a DataLoader"
            )
        self.name, self.data, self.ranks = name, data, ranks
        self._iterator: Iterator[Any] | None = None
        self._start_state: dict[str, Any] | None = None
        self._passes = 0  # that were started
        self._taken = 0
        self._shared = False  # whether somebody else may have taken batches since the pass began

    def take(self) -> Any:
        if self._iterator is not None:
            try:
                batch = next(self._iterator)
            except StopIteration:
                self._check_whole()
            else:
                self._taken += 1
                self._check_whole(ended=False)
                return batch
        sources = self._next_epoch()
        # A sampler may draw its seed at iter() or at the first batch: the two stand together, here and in seek().
        with _as_first(self.data, self.ranks, sources) as self._start_state:
            self._iterator = iter(self.data)
            try:
                batch = next(self._iterator)
            except StopIteration:
                raise empty_set(self.name, self.data, again=True) from None
        self._passes += 1
        self._taken, self._shared = 1, False
        return batch

    def _next_epoch(self) -> Sources | None:
        """What the data draw from; None where an epoch was set, since that may make generators anew."""
        before = {} if self._start_state is None else self._start_state["epochs"]
        sources = Sources({"data": self.data})
        for path, owner in sources.epochs.items():
            if epoch_of(owner) is None:
                owner.set_epoch(self._passes)
            elif before.get(path) is not None:
                owner.set_epoch(before[path] + 1)
        return None if sources.epochs else sources

    def share(self) -> None:
        """An evaluation has been called: it may have iterated the same loader."""
        self._shared = True

    def _check_whole(self, ended: bool = True) -> None:
        """Whether a pass that somebody else may have touched has ended where it should, or has not gone beyond that."""
        if not self._shared:
            return
        expected = length(self.data)
        exact = expected is not None and not isinstance(getattr(self.data, "dataset", self.data), IterableDataset)
        if exact and (self._taken < expected if ended else self._taken > expected):
            what = f"ended after {self._taken}" if ended else "started again in the midst"
            raise InputError(
                f"a pass over the {self.name} set {what} of {expected} batches: either evaluate() looked at the same "
                "loader, which has one pass at a time, so let it use a loader of its own; or its len() is not how many "
                "batches it gives"
            )

    def position(self) -> dict[str, Any] | None:
        if self._iterator is None:
            return None
        return {"start": self._start_state, "taken": self._taken, "passes": self._passes}

    def check(self, batches: int | None, position: dict[str, Any] | None = None) -> None:
        """Whether the data can be those of a saved position; ``batches`` is their length then."""
        if position is not None:
            try:
                start, counts = position["start"], (position["taken"], position["passes"])
            except (KeyError, TypeError):
                start, counts = None, ()
            if not all(isinstance(count, int) and 0 <= count < 2**31 for count in counts):
                start = None
            rng.check_form(start, {"data": self.data})
        if batches != length(self.data):
            raise InputError(
                f"the {self.name} set had {batches} batches when the checkpoint was made and has {length(self.data)} "
                "now: pass the same data"
            )

    def seek(self, position: dict[str, Any] | None) -> None:
        """Moves to a saved position. The caller restores all generators afterwards."""
        if keeps_workers(self.data):  # they were there before this pass, and the first iter() draws a seed for them
            next(iter(self.data), None)
        if position is None:
            return
        self._start_state, self._taken, self._passes = position["start"], position["taken"], position["passes"]
        roots = {"data": self.data}
        for owner in Sources(roots).epochs.values():
            if epoch_of(owner) is None:
                owner.set_epoch(self._passes - 1)
        rng.restore(position["start"], roots)
        self._iterator = iter(self.data)
        for _ in range(self._taken):
            if next(self._iterator, None) is None:
                raise InputError(
                    f"the {self.name} set is shorter than when the checkpoint was made: pass the same data"
                )
