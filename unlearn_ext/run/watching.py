"""What a run remembers so that it can say at its end whether what was asked of it happened."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distributed.batches import cloned
from ..distributed.modes import has_batch_norm
from ..errors import InputError, NonFiniteError
from . import signs

if TYPE_CHECKING:
    from .loop import Loop

__all__ = ["Watching"]


class Watching:
    """Follows one run: a few losses, the weights' bits at the start, and one forget batch where there is batch
    normalisation. Nothing here waits for the device before the end.

    Args:
        retained: retain batches to look at before the first step; the history's losses come after it.
    """

    def __init__(self, loop: Loop, retained: Sequence[Any]):
        self.loop = weakref.proxy(loop)  # in a circle, moments and gradients would outlive the run until a collection
        self.retain, self.forget = signs.Losses(), signs.Losses()
        self._retained = retained
        self.before: list[Tensor | float] = []  # retain losses of the starting weights
        self.bits: list[list[int]] | None = None  # at the start; None: not known
        self.pull: Tensor | float | None = None  # the largest value of the forget term so far
        self.batch: Any = None  # the last forget batch, as its loader gave it
        self.look: dict[str, Any] | None = None
        self._looks: bool | None = None

    def start(self) -> None:
        self.bits = signs.bit_sums(self.loop.parameters)

    def load(self, saved: dict[str, Any]) -> None:
        self.retain, self.forget = (signs.Losses(saved[name]) for name in ("retain", "forget"))
        self.bits, self.pull, self.before = saved["bits"], saved["pull"], saved["before"]

    def state(self) -> dict[str, Any]:
        alone = self.loop.ranks.size == 1  # else each rank has bits of its own
        return {
            "retain": self.retain.state(),
            "forget": self.forget.state(),
            "before": [float(loss) for loss in self.before],
            "bits": self.bits if alone else None,
            "pull": None if self.pull is None else float(self.pull),
        }

    def begin(self) -> None:
        """Before the first step, in the modes of the steps."""
        if self._retained and self.loop.method.retains:
            count = signs.start_batches(self.loop.unlearner.task)
            self.before = self.loop.look_in_steps(itertools.islice(itertools.cycle(self._retained), count))
        self._retained = ()

    def see(self, entry: dict[str, Any]) -> None:
        """An iteration's losses."""
        for name, losses in (("retain_loss", self.retain), ("forget_loss", self.forget)):
            if entry[name] is not None:
                losses.add(entry[name])

    def see_term(self, value: Tensor) -> None:
        """The forget term of a batch, detached."""
        size = value.abs()
        self.pull = size if self.pull is None else torch.clamp(size, min=self.pull)

    def take(self, batch: Any) -> None:
        """A forget batch."""
        if self._looks is None:  # now that all modules are in the modes of the run; calibrated runs look by themselves
            loop = self.loop
            self._looks = loop.ranks.size == 1 and loop.calibrating is None and has_batch_norm(loop.model)
        if self._looks and self._may_be_the_last():
            self.batch = cloned(batch)

    def _may_be_the_last(self) -> bool:
        """Whether the run may be over before the next forget step."""
        loop = self.loop
        end = (loop.iteration // loop.stops_every + 1) * loop.stops_every
        later = range(loop.iteration + 1, min(end, loop.method.iterations))
        return not any(map(loop.method.forgets_at, later))

    def finish(self) -> None:
        """The last forget batch once more, in eval mode."""
        if self.batch is None or not self.forget.count:
            return
        loop, batches = self.loop, [self.batch]
        try:
            losses = loop.look(batches, what="forget", replacement=loop.method.replaces)
            hits = loop.look(batches, hits=True, what="forget") if self._has_accuracy else None
        except NonFiniteError:
            return
        self.batch = None
        accuracy = None if hits is None else float(hits.mean())
        self.look = {"samples": len(losses), "loss": float(losses.mean()), "accuracy": accuracy}

    @property
    def _has_accuracy(self) -> bool:
        try:
            self.loop.unlearner.task.check_accuracy()
        except InputError:
            return False
        return True

    def sentences(self) -> dict[str, str]:
        """By key, of what went wrong."""
        loop, method, result = self.loop, self.loop.method, self.loop.result
        found = {}
        if result.calibration is not None:
            target = getattr(method.calibration, "target", None)
            found["target"] = signs.unmet(result.calibration, target)
        found["unmoved"] = self._unmoved()
        if (
            result.calibration is None or not result.calibration["went_back"]
        ):  # else these losses are of given up weights
            found["retain"] = signs.growth(self.before, self.retain, signs.in_nats(loop.unlearner.task))
        if self.look is not None:
            found["batch_norm"] = signs.hidden(
                float(self.forget.last[-1]),
                self.look["loss"],
                self.look["accuracy"],
                retain=self.retain.end() if self.retain.count else None,
                replaces=method.replaces,
            )
        return {key: sentence for key, sentence in found.items() if sentence is not None}

    def _unmoved(self) -> str | None:
        loop, method = self.loop, self.loop.method
        went_back = loop.result.calibration is not None and loop.result.calibration["ended_at"] == 0
        if went_back:  # which is said already
            return None
        if self.bits is None:
            still = False
        else:
            still = all(loop.ranks.gather_objects(self.bits == signs.bit_sums(loop.parameters)))
        halves = (torch.bfloat16, torch.float16)
        steered = loop.calibrating is not None or method.strength(0) == 0.0
        return signs.unmoved(
            loop.iteration,
            still=still,
            steps=loop.counts["forget_steps"] + loop.counts["retain_steps"],
            lr=max(loop.rates),
            half=not method.stochastic_rounding and any(p.dtype in halves for p in loop.parameters),
            pull=None if steered or self.pull is None else float(self.pull),
            same=self.forget.constant,
        )
