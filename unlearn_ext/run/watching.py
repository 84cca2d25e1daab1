"""What a run remembers so that it can say at its end whether what was asked of it happened."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed.batches import cloned
from ..distributed.modes import has_batch_norm
from ..errors import InputError, NonFiniteError
from . import signs
from .passes import Passes
from .result import Result

__all__ = ["Watching"]


class Watching:
    """Follows one run: a few losses, the weights' bits at the start, and one forget batch where there is batch
    normalisation. Nothing here waits for the device before the end.

    Args:
        retained: retain batches to look at before the first step; the history's losses come after it.
        looks: whether to look at a forget batch in the end; calibrated runs look by themselves.
    """

    def __init__(self, passes: Passes, parameters: Sequence[Tensor], retained: Sequence[Any], looks: bool):
        self.passes, self.context, self.parameters = passes, passes.context, parameters
        self.retain, self.forget = signs.Losses(), signs.Losses()
        self._retained = retained
        self.before: list[Tensor | float] = []  # retain losses of the starting weights
        self.bits: list[list[int]] | None = None  # at the start; None: not known
        self.pull: Tensor | float | None = None  # the largest value of the forget term so far
        self.batch: Any = None  # the last forget batch, as its loader gave it
        self.look: dict[str, Any] | None = None
        self._may_look = looks
        self._looks: bool | None = None

    def start(self) -> None:
        self.bits = signs.bit_sums(self.parameters)

    def load(self, saved: dict[str, Any]) -> None:
        self.retain, self.forget = (signs.Losses(saved[name]) for name in ("retain", "forget"))
        self.bits, self.pull, self.before = saved["bits"], saved["pull"], saved["before"]

    def state(self) -> dict[str, Any]:
        alone = self.context.ranks.size == 1  # else each rank has bits of its own
        return {
            "retain": self.retain.state(),
            "forget": self.forget.state(),
            "before": [float(loss) for loss in self.before],
            "bits": self.bits if alone else None,
            "pull": None if self.pull is None else float(self.pull),
        }

    def begin(self) -> None:
        """Before the first step, in the modes of the steps."""
        if self._retained and self.context.method.retains:
            count = signs.start_batches(self.context.task)
            self.before = self.passes.look_in_steps(itertools.islice(itertools.cycle(self._retained), count))
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

    def take(self, batch: Any, may_be_the_last: Callable[[], bool]) -> None:
        """A forget batch, and whether the run may be over before the next."""
        if self._looks is None:  # now that all modules are in the modes of the run
            alone = self.context.ranks.size == 1
            self._looks = alone and self._may_look and has_batch_norm(self.context.model)
        if self._looks and may_be_the_last():
            self.batch = cloned(batch)

    def finish(self) -> None:
        """The last forget batch once more, in eval mode."""
        if self.batch is None or not self.forget.count:
            return
        passes, batches = self.passes, [self.batch]
        try:
            losses = passes.look(batches, what="forget", replacement=self.context.method.replaces)
            hits = passes.look(batches, hits=True, what="forget") if self._has_accuracy else None
        except NonFiniteError:
            return
        self.batch = None
        accuracy = None if hits is None else float(hits.mean())
        self.look = {"samples": len(losses), "loss": float(losses.mean()), "accuracy": accuracy}

    @property
    def _has_accuracy(self) -> bool:
        try:
            self.context.task.check_accuracy()
        except InputError:
            return False
        return True

    def sentences(self, result: Result, iteration: int, counts: dict[str, int], lr: float) -> dict[str, str]:
        """By key, of what went wrong in a run of so many iterations and steps, with this learning rate at its start."""
        method, found = self.context.method, {}
        if result.calibration is not None:
            target = getattr(method.calibration, "target", None)
            found["target"] = signs.unmet(result.calibration, target)
        found["unmoved"] = self._unmoved(result, iteration, counts, lr)
        if (
            result.calibration is None or not result.calibration["went_back"]
        ):  # else these losses are of given up weights
            found["retain"] = signs.growth(self.before, self.retain, signs.in_nats(self.context.task))
        if self.look is not None:
            found["batch_norm"] = signs.hidden(
                float(self.forget.last[-1]),
                self.look["loss"],
                self.look["accuracy"],
                retain=self.retain.end() if self.retain.count else None,
                replaces=method.replaces,
            )
        return {key: sentence for key, sentence in found.items() if sentence is not None}

    def _unmoved(self, result: Result, iteration: int, counts: dict[str, int], lr: float) -> str | None:
        method = self.context.method
        went_back = result.calibration is not None and result.calibration["ended_at"] == 0
        if went_back:  # which is said already
            return None
        if self.bits is None:
            still = False
        else:
            still = all(self.context.ranks.gather_objects(self.bits == signs.bit_sums(self.parameters)))
        halves = (torch.bfloat16, torch.float16)
        steered = method.calibration is not None or method.strength(0) == 0.0
        return signs.unmoved(
            iteration,
            still=still,
            steps=counts["forget_steps"] + counts["retain_steps"],
            lr=lr,
            half=not method.stochastic_rounding and any(p.dtype in halves for p in self.parameters),
            pull=None if steered or self.pull is None else float(self.pull),
            same=self.forget.constant,
        )
