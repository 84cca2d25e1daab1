"""Looks at the forget and retain sets before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..data import rng
from ..data.streams import empty_set
from ..distributed.batches import cloned
from ..distributed.hashing import sample_hashes, samples_hash
from ..distributed.ranks import ALONE, Ranks
from ..errors import InputError
from . import Task, holds_integers
from .classification import are_indices

__all__ = ["DataCheck"]

_MOST_KINDS = 8  # shapes and dtypes of a set that are tried: a forward pass each


def _extremes(inputs: Tensor | Mapping[str, Tensor], name: str = "") -> dict[tuple[str, str], int]:
    """How long texts are, and the largest and smallest integers (as its negative): sizes of a model's tables."""
    if isinstance(inputs, Mapping):
        return {key: x for name, tensor in inputs.items() for key, x in _extremes(tensor, name).items()}
    if not holds_integers(inputs):
        return {}
    low, high = (int(x) for x in inputs.aminmax())
    length = inputs.shape[1] if inputs.dim() == 2 else 0
    return {(name, "length"): length, (name, "largest"): high, (name, "smallest"): -low}


def _kind(inputs: Tensor | Mapping[str, Tensor]) -> Any:
    """Dtypes and shapes of samples; not the lengths of texts, which differ from batch to batch."""
    if isinstance(inputs, Mapping):
        return {key: _kind(tensor) for key, tensor in inputs.items()}
    is_text = inputs.dim() == 2 and not inputs.is_floating_point()
    return inputs.dtype, inputs.dim() if is_text else inputs.shape[1:]


class DataCheck:
    """Finds samples that stand in two sets, by content hash: one cannot forget what one is told to keep, and what is
    trained on is not unseen. An unseen set is to be looked at first, and the forget set before the others.

    Also, where ``replaces``, forget batches that do not say what shall stand in their place; and those that
    ``refuse_size``, called with the set, a batch and its number of samples, gives an error for. ``ranks`` are those
    whose loaders give different samples. Keeps the first ``keep`` retain batches.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        allow_duplicates: bool,
        replaces: bool = False,
        ranks: Ranks = ALONE,
        refuse_size: Callable[[str, Any, int], InputError | None] | None = None,
        keep: int = 0,
    ):
        self.model, self.task, self.allow_duplicates, self.replaces = model, task, allow_duplicates, replaces
        self.ranks, self.refuse_size, self.keep = ranks, refuse_size, keep
        self.retained: list[Any] = []  # the first retain batches
        self._finished: set[str] = set()
        self._hashes: dict[str, set[bytes]] = {"forget": set(), "unseen": set()}
        self._seen = {"forget": 0, "unseen": 0, "retain": 0, "learn": 0}
        self._kinds: dict[str, list[Any]] = {}  # of batches, by set
        self._extremes: dict[str, dict[tuple[str, str], int]] = {}  # the largest so far, by set
        self._beyond: dict[str, dict[tuple[str, str], Any]] = {}  # their batches, which are tried; None: they were
        self._error: InputError | None = None  # the first that was found
        self.labels: dict[str, set[int]] = {}  # of each set, where there are unseen data and the task has class labels

    def add(self, name: str, batch: Any) -> None:
        self.task.check(batch)
        if name == "forget" and self.replaces:
            self.task.check_replacement(batch)
        self._note_labels(name, batch)
        size, inputs = self.task.size(batch), self.task.inputs(batch)
        self._try_other_kind(name, batch, inputs)
        if self.refuse_size is not None:
            self._error = self._error or self.refuse_size(name, batch, size)
        if name == "forget" or not self.allow_duplicates:
            self._compare(name, inputs)
        if name == "retain" and len(self.retained) < self.keep:
            self.retained.append(cloned(batch))  # some loaders refill one buffer
        self._seen[name] += size
        if self.ranks.size == 1:
            self._raise()

    def _try_other_kind(self, name: str, batch: Any, inputs: Tensor | Mapping[str, Tensor]) -> None:
        """Shows the task a batch of another shape or dtype than those before, which the model may not take, and keeps
        those of the longest texts and of the integers furthest from zero for :meth:`_try_beyond`; ranks with samples of
        their own would wait for each other in its forward pass."""
        if self.ranks.size > 1:
            return
        kinds, kind = self._kinds.setdefault(name, []), _kind(inputs)
        first, other = not kinds, kind not in kinds and len(kinds) < _MOST_KINDS
        if other:
            kinds.append(kind)
        known, extremes = self._extremes.setdefault(name, {}), _extremes(inputs)
        beyond = {key: x for key, x in extremes.items() if key not in known or x > known[key]}
        known.update(beyond)
        if other and not first:  # the first has been shown
            self._begin(batch)
        if beyond:
            untried = None if first or other else cloned(batch)
            self._beyond.setdefault(name, {}).update(dict.fromkeys(beyond, untried))

    def _try_beyond(self, name: str) -> None:
        """Once for each batch, of which there are at most three for each input: in a set that is sorted, every batch is
        beyond those before."""
        batches = self._beyond.pop(name, {}).values()
        for batch in {id(batch): batch for batch in batches if batch is not None}.values():
            self._begin(batch)

    def _begin(self, batch: Any) -> None:
        with rng.kept({"task": self.task.generators()}):
            self.task.begin(self.model, batch)

    def _compare(self, name: str, inputs: Tensor | Mapping[str, Tensor]) -> None:
        hashes = sample_hashes(inputs)
        for other, known in self._hashes.items():
            for i, found in enumerate(hashes) if other != name else ():
                if found in known and self._error is None:
                    self._error = InputError(
                        f"sample {self._seen[name] + i} of the {name} set is also in the {other} set: remove it "
                        "from one of them, or set allow_duplicates=True (--allow-duplicates) to go on"
                    )
        if name in self._hashes:
            self._hashes[name].update(hashes)

    def _note_labels(self, name: str, batch: Any) -> None:
        """The unseen set comes first: without one nobody asks."""
        if (name != "unseen" and "unseen" not in self.labels) or not hasattr(self.task, "labels"):
            return
        labels = self.task.labels(batch)
        if are_indices(labels):
            self.labels.setdefault(name, set()).update(labels.unique().tolist())

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def finish(self, name: str) -> None:
        """After a pass over a set: every rank learns of what the others were given, and none goes on alone."""
        self._finished.add(name)
        if name in self._hashes:
            self._hashes[name] = set().union(*self.ranks.gather_objects(self._hashes[name]))
        with self.ranks.together():
            self._raise()
            self._try_beyond(name)

    def scan(self, name: str, data: Iterable[Any]) -> None:
        """A pass over the data alone, for runs that need no Fisher pass."""
        count = 0
        for batch in data:
            if not count:
                self.task.begin(self.model, batch)
            self.add(name, batch)
            count += 1
        if not count:
            raise empty_set(name, data)
        self.finish(name)

    def scan_rest(self, sets: Mapping[str, Iterable[Any]]) -> None:
        """Those that have not been looked at."""
        for name, data in sets.items():
            if name not in self._finished:
                self.scan(name, data)

    def sizes(self) -> dict[str, int]:
        """The samples of each set that was looked at, over all ranks."""
        own = {name: count for name, count in self._seen.items() if name in self._finished}
        found = self.ranks.gather_objects(own)
        return {name: sum(of_rank[name] for of_rank in found) for name in own}

    @property
    def forget_hash(self) -> str | None:
        return samples_hash(self._hashes["forget"]) if self._hashes["forget"] else None
