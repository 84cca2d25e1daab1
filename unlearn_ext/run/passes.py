"""Forward passes of a run: batches become losses over all ranks, and looks at data leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import rng
from ..data.streams import BatchStream
from ..distributed.batches import cloned, own_part, without_inference
from ..distributed.modes import evaluating
from ..distributed.weights import check_same, forms
from ..distributed.wrappers import buffers_of, reshard
from ..errors import InputError, NonFiniteError
from ..methods.values import ForgetLoss
from ..utils.plain import plain
from .checkpoint import Checkpoint
from .context import RunContext
from .packing import copy_of, put

__all__ = ["BatchLoss", "Passes"]


@dataclass(frozen=True)
class BatchLoss:
    """A batch, over all ranks.

    Attributes:
        loss: whose gradient, averaged over the ranks, is the batch's.
        mean: of the per-sample losses.
        reduced: the forget or retain term summed over ranks, to detect losses that are not finite.
        weight: what the batch counts where several are accumulated.
        largest_share: of one sample.
    """

    loss: Tensor
    mean: Tensor
    reduced: Tensor
    weight: float | Tensor
    largest_share: Tensor | None


class Passes:
    """What steps, looks and evaluations share: streams of batches, teachers, buffers and random numbers.

    Attributes:
        begun: whether the task has learned from the model what batches must fit.
    """

    def __init__(self, context: RunContext, streams: dict[str, BatchStream], teachers: dict[str, nn.Module]):
        self.context, self.teachers = context, teachers
        self.unseen = streams.pop("unseen", None)
        self.streams = streams
        self.begun = False
        # Buffers, by module and name, and what they held before the step at hand.
        self.before: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self.buffers = self.versions()
        self.forms = forms(context.model)

    def roots(self) -> dict[str, Any]:
        """Where generators, epochs and counters are looked for, beside the global generators."""
        streams = [*self.streams.values(), *([] if self.unseen is None else [self.unseen])]
        task = self.context.task
        return {
            **{stream.name: stream.data for stream in streams},
            "task": task,
            "task.generators": task.generators(),
            "method": self.context.method,
            "model": self.context.model,
            "teachers": self.teachers,
        }

    def remember_buffers(self) -> None:
        """A batch that is not finite reaches BatchNorm's statistics before its loss tells.

        Tables that nothing writes are copied the first time only; BatchNorm writes without a mark on the version.
        """
        first = not self.before
        self.before = [
            (module, name, buffer, copy_of(buffer))
            for module, name, at_start, version in self.buffers
            if (buffer := getattr(module, name)) is not None
            and (first or buffer is not at_start or buffer._version != version or name.startswith("running_"))
        ]

    def restore_buffers(self) -> None:
        """As they were before the step at hand."""
        for module, name, buffer, before in self.before:
            put(buffer, before)
            if getattr(module, name) is not buffer:  # the module has put another in its place
                setattr(module, name, buffer)

    def versions(self) -> list[tuple[nn.Module, str, Tensor, int]]:
        return [(*place, buffer, buffer._version) for place, buffer in buffers_of(self.context.model)]

    def losses(self, batch: Any, name: str, teacher: str | None) -> tuple[tuple[Tensor, ...], int]:
        """Per-sample losses of this rank's part of a batch, with the distances to a teacher if there is one, and how
        many samples count."""
        context = self.context
        prepared, count = self._prepared(batch)
        if teacher is not None:
            return context.losses_and_distances(prepared, count, self.teachers[teacher], name), count
        return (context.losses(prepared, count, name == "forget" and context.method.replaces),), count

    def _prepared(self, batch: Any) -> tuple[Any, int]:
        context = self.context
        if not self.begun:
            with rng.kept(self.roots()):
                context.task.begin(self.context.model, batch)
            self.restore_buffers()  # the run made that forward pass before it was stopped
            self.begun = True
        prepared = without_inference(context.task.prepare(batch, context.device))
        count = context.task.size(batch)
        if context.split_batches:
            return own_part(prepared, count, self.context.ranks)
        return prepared, count

    def sample(self, name: str, limit: int) -> list[Any]:
        """Batches with about the first ``limit`` samples of a pass over the unseen or forget set. The run's random
        numbers go on as if nothing had been drawn; but some loaders have one pass at a time: call it before the run
        draws."""
        stream = self.unseen if name == "unseen" else self.streams[name]
        found: list[Any] = []
        count = 0
        with rng.kept(self.roots()):
            for batch in stream.data:
                found.append(cloned(batch))
                count += self.context.task.size(batch)
                if count >= limit:
                    break
        return found

    def random_state(self) -> dict[str, Any]:
        """What looks draw from. Their batches are held, so loaders stay where the run has them; of the task, only
        numbers are put back, and nothing that it has made since."""
        state = rng.capture(self.roots())
        of_task = {path: owner for path, owner in state["counters"].items() if path.partition(".")[0] == "task"}
        numbers = {
            path: {name: value for name, value in owner.items() if value is not None} for path, owner in of_task.items()
        }
        return {**state, "epochs": {}, "states": {}, "counters": numbers}

    @torch.no_grad()
    def look(
        self,
        batches: Iterable[Any],
        hits: bool = False,
        what: str = "unseen",
        state: dict[str, Any] | None = None,
        replacement: bool = False,
    ) -> Tensor:
        """Losses of all samples, or which of them are got right, [N] on the CPU, in eval mode; what is drawn for it is
        drawn from :meth:`random_state` ``state``. The run's random numbers go on as if nothing had been drawn."""
        roots = self.roots()
        with rng.kept(roots), evaluating(self.context.model):
            if state is not None:
                rng.restore(state, roots)
            prepared = (self._prepared(batch) for batch in batches)
            if hits:
                measured = [self.context.hits(*batch) for batch in prepared]
            else:
                measured = [self.context.losses(*batch, replacement) for batch in prepared]
            losses = torch.cat([part.double().cpu() for part in measured])
        if not bool(torch.isfinite(losses).all()):
            raise NonFiniteError(f"a loss on {what} data is not finite: check that data, lower lr or forget_alpha")
        return losses

    def look_in_steps(self, batches: Iterable[Any]) -> list[Tensor]:
        """Mean losses of batches as a retain step takes them. Buffers and random numbers go on as if there had been no
        look."""
        means = []
        self.remember_buffers()
        # One process records as a step does: a compiled model then has the graph already that its steps use.
        try:
            with rng.kept(self.roots()), torch.set_grad_enabled(self.context.ranks.size == 1):
                for batch in batches:
                    prepared, count = self._prepared(batch)
                    losses = self.context.losses(prepared, count)
                    means.append(self.over_ranks(ForgetLoss(losses.detach().mean()), losses, count).mean)
                    del prepared, losses  # or this graph would live through the next forward pass
        finally:
            reshard(self.context.model)
            self.restore_buffers()
            self.before, self.buffers = [], self.versions()
        return means

    def over_ranks(self, term: ForgetLoss, losses: Tensor, count: int) -> BatchLoss:
        """What this rank has of a batch, from what its own samples give.

        The ranks' gradients are averaged, each counting alike, and a method weighs its samples to a sum of 1: the loss
        times W c_r / Σ_r c_r, c_r being the sum of a rank's unnormalised weights and W the ranks, gives the gradient of
        the whole batch.
        """
        mean, weight = losses.detach().mean(), count if term.weight is None else term.weight
        if self.context.ranks.size == 1:
            return BatchLoss(term.loss, mean, term.loss.detach(), weight, term.largest_share)
        numbers = [weight, count, mean * count, term.loss.detach() * count]
        numbers.append(0.0 if term.largest_share is None else term.largest_share * weight)
        numbers = [x if isinstance(x, Tensor) else mean.new_full((), x, dtype=torch.float64) for x in numbers]
        row = torch.stack([x.double() for x in numbers])
        rows = self.context.ranks.gather(row if count else torch.zeros_like(row))
        totals = rows.sum(0)
        factor = rows[self.context.ranks.rank, 0] * self.context.ranks.size / totals[0]
        share = None if term.largest_share is None else rows[:, 4].max() / totals[0]
        return BatchLoss(term.loss * factor.to(term.loss.dtype), totals[2] / totals[1], totals[3], totals[0], share)

    def evaluate(self, evaluate: Callable[[nn.Module, int], Any], iteration: int) -> tuple[bool, Any]:
        """Whether a user's evaluation gives something to keep, and what, as a file can hold it: the first rank's on all
        of them. It draws no numbers of the run's and may not change the model."""
        model = self.context.model
        with rng.kept(self.roots()), evaluating(model):
            verdict = evaluate(model, iteration)
        check_same(model, self.forms)
        for stream in self.streams.values():
            stream.share()
        if getattr(verdict, "ndim", None) == 0:  # a NumPy or PyTorch scalar, as a comparison gives
            verdict = verdict.item()
        keep = verdict is not None and not isinstance(verdict, bool)
        return self.context.ranks.from_first((keep, plain(verdict)))

    def seek(self, checkpoint: Checkpoint) -> None:
        """Streams go on where they were when the checkpoint was written.

        Raises:
            InputError: one cannot; none has moved then.
        """
        document, ranks = checkpoint.document, self.context.ranks
        size = len(document["rng"])
        if size != ranks.size and not self.context.split_batches:
            raise InputError(
                f"{checkpoint.path} is of {size} ranks that had samples of their own: go on with as many, or start "
                "anew with whole batches (split_batches=True)"
            )
        saved = ranks.rank if size == ranks.size else 0
        with ranks.together():
            for name, stream in self.streams.items():
                stream.check(document["batches"][saved].get(name), document["streams"][saved].get(name))
            rng.check(document["rng"][saved], self.roots())
        for name, stream in self.streams.items():
            stream.seek(document["streams"][saved].get(name))

    def restore_generators(self, saved: list[dict[str, Any]]) -> None:
        """Each rank's own; where there are more or fewer ranks than there were, those of the first, and noise that
        only modules draw (dropout) goes on otherwise."""
        rank, size = self.context.ranks.rank, self.context.ranks.size
        rng.restore(saved[rank if len(saved) == size else 0], self.roots())
        if len(saved) != size and rank > 0:
            torch.manual_seed(torch.initial_seed() + rank)
