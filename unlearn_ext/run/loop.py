"""The iterations of one run: batches become gradients, steps, history and checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from ..data import rng
from ..data.streams import BatchStream, length
from ..distributed.batches import cloned, own_part, without_inference
from ..distributed.modes import evaluating, keeping_statistics
from ..distributed.shards import local
from ..distributed.weights import check_same, forms
from ..distributed.wrappers import buffers_of, reshard
from ..errors import InputError, NonFiniteError, ProtectionError, UnlearnError
from ..methods.base import ForgetLoss
from ..optim import UnlearnOptimizer
from ..saliency.protection import protected_count, protected_hashes
from ..utils.gradients import no_gradient
from ..utils.plain import plain
from . import checkpoint as checkpoints
from .averages import Averages
from .calibrating import Calibrating
from .history import History
from .module_state import unsaved_sums
from .packing import copy_of, put
from .signals import Stop
from .teachers import make_teachers
from .watching import Watching

if TYPE_CHECKING:
    from .unlearner import Result, Unlearner

__all__ = ["Loop", "Progress"]

Progress = Callable[[str, int, int | None], None]


# What a history entry tells of a forget step.
_OF_FORGETTING = ("forget_loss", "alpha", "clip", "largest_share", "forget_skipped")


@dataclass(frozen=True)
class _BatchLoss:
    """A batch, over all ranks.

    Attributes:
        loss: whose gradient, averaged over the ranks, is the batch's.
        mean: of the per-sample losses.
        told: not finite where a rank's loss is not; the same on all ranks.
        weight: what the batch counts where several are accumulated.
        largest_share: of one sample.
    """

    loss: Tensor
    mean: Tensor
    told: Tensor
    weight: float | Tensor
    largest_share: Tensor | None


class Loop:
    """The iterations of one run, and what a checkpoint needs of them. The model is in the modes of the steps all along:
    a change of mode may change weights (adapters that are merged in eval mode), which are read and restored here."""

    def __init__(
        self,
        unlearner: Unlearner,
        optimizer: UnlearnOptimizer,
        streams: dict[str, BatchStream],
        result: Result,
        directory: Path | None,
        progress: Progress,
        stop: Stop,
        retained: Sequence[Any],
    ):
        self.run_id = ""  # of the run that a resumed one goes on with
        self.stop, self.saves = stop, False
        self.unlearner, self.method, self.model = unlearner, unlearner.method, unlearner.model
        self.ranks = unlearner.ranks
        self.optimizer, self.result, self.directory, self.progress = optimizer, result, directory, progress
        self.unseen = streams.pop("unseen", None)
        self.streams = streams
        self.named = optimizer.named_parameters()
        self.parameters = [p for _, p in self.named]
        self.forms = forms(self.model)
        self.buffers = self._versions()
        self.unsaved, self.written = unsaved_sums(self.model), set()
        # Buffers, by module and name, and what they held before the step at hand.
        self.before: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self.history = History(directory if self.ranks.first else None, result.history)
        self.forgetting: dict[str, Any] = {}  # of the last forget step that no entry has shown yet
        self.iteration = 0
        self.checked = 0  # iterations whose gradients are known to be finite
        self.begun = False  # whether the task has learned from the model what batches must fit
        self.forgot = False  # whether this iteration has made its forget step
        self.seconds = 0.0
        self.stops_every = self.method.iterations  # between two moments at which the run may be over
        self.counts = {"iterations": 0, "forget_steps": 0, "retain_steps": 0}
        # One for each side: the forget loss is alpha times larger, so that it starts at a scale as much smaller, and
        # where it overflows only its own scale shrinks.
        largest = max(1, math.ceil(self.method.strength(0)))
        scales = {"forget": 2.0 ** (16 - (largest - 1).bit_length()), "retain": 2.0**16}
        self.scalers = {
            side: torch.amp.GradScaler(unlearner.device.type, init_scale=scale)
            for side, scale in (scales.items() if unlearner.mixed_precision == "fp16" else ())
        }
        self.teachers = make_teachers(self.model, self.method)
        calibration = getattr(self.method, "calibration", None)
        self.calibrating = None if calibration is None else Calibrating(self, calibration)
        self.protected: list[int] | None = None
        decay = unlearner.ema_decay
        self.averages = None if decay is None else Averages(unlearner._named, decay)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.watching = Watching(self, retained)

    def _roots(self) -> dict[str, Any]:
        """Where generators, epochs and counters are looked for, beside the global generators."""
        streams = [*self.streams.values(), *([] if self.unseen is None else [self.unseen])]
        task = self.unlearner.task
        return {
            **{stream.name: stream.data for stream in streams},
            "task": task,
            "task.generators": task.generators(),
            "method": self.method,
            "model": self.model,
            "teachers": self.teachers,
        }

    def _fully_protected(self) -> bool:
        every_step = self.method.mask_scope == "all" or not self.method.retains
        return self.result.mask is not None and self.method.protect and every_step

    def start(self, checkpoint: checkpoints.Checkpoint | None) -> None:
        self._clear()
        if checkpoint is None:
            self.begun = True  # by the first pass
            self.run_id = self.ranks.from_first(uuid.uuid4().hex)
            with self.ranks.together():
                self.history.begin()
            self.watching.start()
            if self._fully_protected():
                self.protected = protected_hashes(self.parameters, self.optimizer.mask_bits)
            return
        document = checkpoint.document
        size, split = len(document["rng"]), self.unlearner.split_batches
        if size != self.ranks.size and not split:
            raise InputError(
                f"{checkpoint.path} is of {size} ranks that had samples of their own: go on with as many, or start "
                "anew with whole batches (split_batches=True)"
            )
        saved = self.ranks.rank if size == self.ranks.size else 0
        with self.ranks.together():
            for name, stream in self.streams.items():
                stream.check(document["batches"][saved].get(name), document["streams"][saved].get(name))
            rng.check(document["rng"][saved], self._roots())
        for name, stream in self.streams.items():
            stream.seek(document["streams"][saved].get(name))
        averages = None if self.averages is None else self.averages.tensors
        checkpoints.restore(checkpoint, self._models(), self.optimizer, averages)
        self.run_id, self.written = document["run"], set(document["packed"]["model"]["buffers"])
        self.method.load_state(document["method"])
        self.iteration = self.checked = document["iteration"]
        self.seconds, self.counts, self.forgetting = document["seconds"], document["counts"], document["forgetting"]
        self.protected = document["protected"]
        self.watching.load(document["watching"])
        # An evaluation's word holds for the run that it stopped, and not for one of another length.
        if document["settings"].get("iterations") == self.method.iterations:
            self.result.stopped_at = document["stopped_at"]
        self.result.timings.update(document["timings"])
        for side, scaler in self.scalers.items():
            scaler.load_state_dict(document["scalers"][side])
        with self.ranks.together():
            self.history.go_on(checkpoint.history, own=checkpoint.path.resolve().parent == self._home())
        self._restore_generators(document["rng"])

    def _home(self) -> Path | None:
        return None if self.directory is None else self.directory.resolve()

    def _restore_generators(self, saved: list[dict[str, Any]]) -> None:
        """Each rank's own; where there are more or fewer ranks than there were, those of the first, and noise that
        only modules draw (dropout) goes on otherwise."""
        rank, size = self.ranks.rank, self.ranks.size
        rng.restore(saved[rank if len(saved) == size else 0], self._roots())
        if len(saved) != size and rank > 0:
            torch.manual_seed(torch.initial_seed() + rank)

    def run(self, checkpointing_steps, checkpoints_total_limit, evaluate, evaluate_every, log_every) -> None:
        method, result = self.method, self.result
        self.buffers = self._versions()  # as the first step of this process meets them
        self.stops_every = evaluate_every if evaluate is not None and evaluate_every else method.iterations
        self.saves = self.directory is not None and (checkpointing_steps is not None or self.iteration > 0)
        limit = checkpoints_total_limit
        try:
            self.watching.begin()
            while result.stopped_at is None and self.iteration < method.iterations:
                started = time.perf_counter()
                self.stop.waits = True
                entry = self._iterate_or_end()
                self.watching.see(entry)
                if entry["forget_loss"] is not None:
                    self.forgetting = {key: entry[key] for key in _OF_FORGETTING if key in entry}
                self.iteration += 1
                stop, paused = False, 0.0
                if self.calibrating is not None:
                    stop = self.calibrating.after(self.iteration, self.iteration == method.iterations, entry)
                if evaluate is not None and evaluate_every and self.iteration % evaluate_every == 0:
                    asked, paused = self._evaluate(evaluate, entry)
                    stop |= asked
                last = stop or self.iteration == method.iterations
                logs = last or self.iteration % log_every == 0 or {"evaluation", "calibration"} & entry.keys()
                if logs:
                    self._raise_if_non_finite()  # waits for the device, so the clock below is right as well
                    self.history.add({**entry, **self.forgetting} if entry["forget_loss"] is None else entry)
                    self.forgetting = {}
                self.seconds += time.perf_counter() - started - paused
                self.progress("unlearning", self.iteration, method.iterations)
                if stop:
                    result.stopped_at = self.iteration
                saved = bool(checkpointing_steps) and self.iteration % checkpointing_steps == 0
                if saved:
                    self._save(limit)
                # Several ranks agree where they wait for each other anyway.
                if (logs or self.ranks.size == 1) and self.stop.on_any_rank(self.unlearner.device):
                    self._end(saved, limit)
            self.stop.waits = False
            if self.calibrating is not None:
                result.calibration = self.calibrating.finish()
            self.watching.finish()
        except Exception as error:  # NaN may come as an error of the model's or of torch's anomaly mode
            rescued = error if self.calibrating is None else self.calibrating.rescue(error)
            if rescued is error:
                raise
            raise rescued from None
        finally:
            self.stop.waits = False
            self._clear()
        check_same(self.model, self.forms)
        self._finish()

    def _iterate_or_end(self) -> dict[str, Any]:
        """A signal may reach a loader's worker as well, so that the iteration cannot be finished."""
        try:
            return self._iterate(self.iteration)
        except Exception as error:
            if self.stop.number is None or isinstance(error, UnlearnError):
                raise
            how = "go on from the last checkpoint" if self.saves else "nothing was saved to go on from"
            self.stop.end(f"in iteration {self.iteration}, which could not be finished: {how}")

    def _end(self, saved: bool, limit: int | None) -> NoReturn:
        """After a signal: saves what is done, unless it is, and ends the run."""
        done = f"after {self.iteration} of {self.method.iterations} iterations"
        if not self.saves:
            self.stop.end(
                f"{done}: nothing was saved to go on from, which takes an output_dir and checkpointing_steps",
                self.iteration,
            )
        if not saved:
            self._save(limit)
        path = self.directory / f"checkpoint-{self.iteration}"
        self.stop.end(f"{done}: go on with resume_from_checkpoint={str(path)!r}", self.iteration, path)

    def _evaluate(self, evaluate: Callable[[nn.Module, int], Any], entry: dict[str, Any]) -> tuple[bool, float]:
        """Whether to stop, and the seconds it took, which are not the run's."""
        started = time.perf_counter()
        with rng.kept(self._roots()), evaluating(self.model):
            verdict = evaluate(self.model, self.iteration)
        self._clear()
        check_same(self.model, self.forms)
        for stream in self.streams.values():
            stream.share()
        if getattr(verdict, "ndim", None) == 0:  # a NumPy or PyTorch scalar, as a comparison gives
            verdict = verdict.item()
        keep = verdict is not None and not isinstance(verdict, bool)
        keep, verdict = self.ranks.from_first((keep, plain(verdict)))
        if keep:
            entry["evaluation"] = verdict
        return verdict is True, time.perf_counter() - started

    # --- One iteration --------------------------------------------------------------------------------------

    def _iterate(self, t: int) -> dict[str, Any]:
        method, optimizer = self.method, self.optimizer
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["initial_lr"] = rate  # forget_lr follows lr through this, as under torch's schedulers
            group["lr"] = rate * method.lr_factor(t)
        entry: dict[str, Any] = dict.fromkeys(
            ("iteration", "forget_loss", "retain_loss", "lr", "alpha", "clip", "largest_share")
        )
        entry.update(iteration=t, lr=optimizer.param_groups[0]["lr"])
        self._remember_buffers()
        self.forgot = False
        try:
            if self.calibrating is not None and t == 0:
                self.calibrating.start()
            if method.unseen_at(t):
                entry["unseen_loss"] = float(self.look(self.unseen.data).mean())
                method.take_unseen(entry["unseen_loss"])
            forget_grads = None
            if method.forgets_at(t):
                kept = method.batch_norm_statistics == "retain"
                with keeping_statistics(self.model) if kept else contextlib.nullcontext():
                    forget_grads = self._forget(t, entry)
            if method.retains_at(t):
                self._retain(t, entry, forget_grads)
            if self.averages is not None:
                self.averages.update()
        except NonFiniteError as error:
            self._restore_buffers()
            made = "; its forget step had been made" if self.forgot else ""
            raise NonFiniteError(f"iteration {t}: {error}{made}") from None
        if self.forgot:
            entry["clip"] = optimizer.last_clip
        self.counts["iterations"] += 1
        return entry

    def _forget(self, t: int, entry: dict[str, Any]) -> list[Tensor | None] | None:
        """A forget step; or, for the joint update, only its gradients.

        Accumulated, the gradient is the running mean of the batches', each by its samples' weights: unnormalised sums
        would do the same, and overflow.
        """
        means, largest, total = [], None, 0.0
        for number in range(self.unlearner.gradient_accumulation_steps):
            parts, count = self._losses("forget", self.method.forget_teacher)
            losses, forget = parts[0], self.method.forget_loss(parts[0], t, *parts[1:])
            batch = self._over_ranks(forget, losses, count)
            means.append(batch.mean)
            self.watching.see_term(batch.told)
            total = total + batch.weight
            loss, share = batch.loss, batch.largest_share
            if number > 0:
                part = batch.weight / total
                torch._foreach_mul_([local(p.grad) for p in self.parameters if p.grad is not None], 1 - part)
                loss = part * loss
                if share is not None:
                    largest, share = (1 - part) * largest, part * share
            largest = share if largest is None else torch.maximum(largest, share)
            self._backward(loss, batch, "forget")
        alpha = self.method.strength(t) if self.calibrating is None else None  # each sample has its own
        entry.update(forget_loss=torch.stack(means).mean(), alpha=alpha, largest_share=largest)
        if self.method.update == "joint":
            gradients = [p.grad for p in self.parameters]
            if getattr(self.model, "gradient_as_bucket_view", False):  # which the next backward pass writes to
                gradients = [None if gradient is None else gradient.clone() for gradient in gradients]
            self._clear()
            return gradients
        self._step("forget", entry)
        self._remember_buffers()
        return None

    def _remember_buffers(self) -> None:
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

    def _restore_buffers(self) -> None:
        """As they were before the step at hand."""
        for module, name, buffer, before in self.before:
            put(buffer, before)
            if getattr(module, name) is not buffer:  # the module has put another in its place
                setattr(module, name, buffer)

    def _versions(self) -> list[tuple[nn.Module, str, Tensor, int]]:
        return [(*place, buffer, buffer._version) for place, buffer in buffers_of(self.model)]

    def _retain(self, t: int, entry: dict[str, Any], forget_grads: list[Tensor | None] | None) -> None:
        method, steps = self.method, self.unlearner.gradient_accumulation_steps
        sides = [("retain", method.retain_loss, method.retain_teacher)]
        if method.learns:  # its gradient is added to the retain gradient
            sides.append(("learn", method.learn_loss, None))
        for name, weigh, teacher in sides:
            means = []
            for _ in range(steps):
                parts, count = self._losses(name, teacher)
                batch = self._over_ranks(ForgetLoss(weigh(parts[0], t, *parts[1:])), parts[0], count)
                means.append(batch.mean)
                self._backward(batch.loss / steps, batch, name)
            entry[f"{name}_loss"] = torch.stack(means).mean()
        if forget_grads is None:
            self._step("retain", entry)
            return
        self.optimizer.joint_step(forget_grads)
        if method.project:
            entry["projection"] = self.optimizer.last_projection
        self._clear()
        self.forgot = True
        self.counts["forget_steps"] += 1
        self.counts["retain_steps"] += 1

    def _losses(self, name: str, teacher: str | None) -> tuple[tuple[Tensor, ...], int]:
        """Per-sample losses of this rank's part of a batch, with the distances to a teacher if there is one, and how
        many samples count."""
        batch = self.streams[name].take()
        if name == "forget":
            self.watching.take(batch)
        prepared, count = self._prepared(batch)
        if teacher is not None:
            return self.unlearner.losses_and_distances(prepared, count, self.teachers[teacher], name), count
        return (self.unlearner.losses(prepared, count, name == "forget" and self.method.replaces),), count

    def _prepared(self, batch: Any) -> tuple[Any, int]:
        unlearner = self.unlearner
        if not self.begun:
            with rng.kept(self._roots()):
                unlearner.task.begin(self.model, batch)
            self._restore_buffers()  # the run made that forward pass before it was stopped
            self.begun = True
        prepared = without_inference(unlearner.task.prepare(batch, unlearner.device))
        count = unlearner.task.size(batch)
        if unlearner.split_batches:
            return own_part(prepared, count, self.ranks)
        return prepared, count

    def sample(self, name: str, limit: int) -> list[Any]:
        """Batches with about the first ``limit`` samples of a pass over the unseen or forget set. The run's random
        numbers go on as if nothing had been drawn; but some loaders have one pass at a time: call it before the run
        draws."""
        stream = self.unseen if name == "unseen" else self.streams[name]
        found: list[Any] = []
        count = 0
        with rng.kept(self._roots()):
            for batch in stream.data:
                found.append(cloned(batch))
                count += self.unlearner.task.size(batch)
                if count >= limit:
                    break
        return found

    def random_state(self) -> dict[str, Any]:
        """What looks draw from. Their batches are held, so loaders stay where the run has them; of the task, only
        numbers are put back, and nothing that it has made since."""
        state = rng.capture(self._roots())
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
        roots = self._roots()
        with rng.kept(roots), evaluating(self.model):
            if state is not None:
                rng.restore(state, roots)
            prepared = (self._prepared(batch) for batch in batches)
            if hits:
                measured = [self.unlearner.hits(*batch) for batch in prepared]
            else:
                measured = [self.unlearner.losses(*batch, replacement) for batch in prepared]
            losses = torch.cat([part.double().cpu() for part in measured])
        if not bool(torch.isfinite(losses).all()):
            raise NonFiniteError(f"a loss on {what} data is not finite: check that data, lower lr or forget_alpha")
        return losses

    def look_in_steps(self, batches: Iterable[Any]) -> list[Tensor]:
        """Mean losses of batches as a retain step takes them. Buffers and random numbers go on as if there had been no
        look."""
        means = []
        self._remember_buffers()
        # One process records as a step does: a compiled model then has the graph already that its steps use.
        try:
            with rng.kept(self._roots()), torch.set_grad_enabled(self.ranks.size == 1):
                for batch in batches:
                    prepared, count = self._prepared(batch)
                    losses = self.unlearner.losses(prepared, count)
                    means.append(self._over_ranks(ForgetLoss(losses.detach().mean()), losses, count).mean)
                    del prepared, losses  # or this graph would live through the next forward pass
        finally:
            reshard(self.model)
            self._restore_buffers()
            self.before, self.buffers = [], self._versions()
        return means

    def _over_ranks(self, own: ForgetLoss, losses: Tensor, count: int) -> _BatchLoss:
        """What this rank has of a batch, from what its own samples give.

        The ranks' gradients are averaged, each counting alike, and a method weighs its samples to a sum of 1: the loss
        times W c_r / Σ_r c_r, c_r being the sum of a rank's unnormalised weights and W the ranks, gives the gradient of
        the whole batch.
        """
        mean, weight = losses.detach().mean(), count if own.weight is None else own.weight
        if self.ranks.size == 1:
            return _BatchLoss(own.loss, mean, own.loss.detach(), weight, own.largest_share)
        numbers = [weight, count, mean * count, own.loss.detach() * count]
        numbers.append(0.0 if own.largest_share is None else own.largest_share * weight)
        numbers = [x if isinstance(x, Tensor) else mean.new_full((), x, dtype=torch.float64) for x in numbers]
        row = torch.stack([x.double() for x in numbers])
        rows = self.ranks.gather(row if count else torch.zeros_like(row))
        totals = rows.sum(0)
        factor = rows[self.ranks.rank, 0] * self.ranks.size / totals[0]
        share = None if own.largest_share is None else rows[:, 4].max() / totals[0]
        return _BatchLoss(own.loss * factor.to(own.loss.dtype), totals[2] / totals[1], totals[3], totals[0], share)

    def _backward(self, loss: Tensor, batch: _BatchLoss, side: str) -> None:
        if self.unlearner.device.type == "cpu" and not bool(torch.isfinite(batch.told)):
            mean = batch.mean.item()  # from which a method may make a term that is not finite
            what = f"term is {batch.told.item()}" if math.isfinite(mean) else f"loss is {mean}"
            raise NonFiniteError(
                f"the {side} {what} and the step was not made: check the data, lower lr or forget_alpha"
            )
        if not loss.requires_grad:
            raise no_gradient(side)
        side = "forget" if side == "forget" else "retain"  # of the steps
        own, optimizer = self.unlearner.optimizer_in_backward, self.optimizer
        if own and (optimizer.max_norm if side == "forget" else optimizer.retain_max_norm) is not None:
            with optimizer.norm_in_backward(side):
                loss.backward(retain_graph=True)
        with optimizer.step_in_backward(side) if own else contextlib.nullcontext():
            (self.scalers[side].scale(loss) if self.scalers else loss).backward()
        if not own and all(p.grad is None for p in self.parameters):
            raise no_gradient(side)

    def _step(self, side: str, entry: dict[str, Any]) -> None:
        """A forget or retain step on ``.grad``; a GradScaler leaves it out when a scaled gradient overflowed."""
        step = self.optimizer.forget_step if side == "forget" else self.optimizer.retain_step
        if self.unlearner.optimizer_in_backward:
            made = True  # by the backward pass
        elif not self.scalers:
            step()
            made = True
        else:
            # All that a scaler asks of an optimizer; it hands on what step() returns, or None where it left it out.
            target = SimpleNamespace(param_groups=self.optimizer.param_groups, step=lambda: step() is None)
            made = self.scalers[side].step(target) is True
            self.scalers[side].update()
        self._clear()
        if made:
            self.counts[f"{side}_steps"] += 1
            self.forgot |= side == "forget"
        else:
            entry[f"{side}_skipped"] = True

    def _raise_if_non_finite(self) -> None:
        first, last, self.checked = self.checked, self.iteration - 1, self.iteration
        try:
            self.optimizer.raise_if_non_finite()
        except NonFiniteError as error:
            where = f"iteration {last}" if first == last else f"iterations {first} to {last}"
            raise NonFiniteError(f"{where}: {error}") from None

    def _clear(self) -> None:
        for p in self.parameters:
            p.grad = None

    # --- After it -------------------------------------------------------------------------------------------

    def _save(self, limit: int | None) -> None:
        self._raise_if_non_finite()
        checkpoints.save(
            self.directory,
            self.run_id,
            self.iteration,
            self._models(),
            self.optimizer,
            self.result.mask,
            {} if self.averages is None else self.averages.tensors,
            self.history.entries,
            {
                "settings": self.unlearner.settings(),
                "masked": self.result.mask is not None,
                "seconds": self.seconds,
                "counts": self.counts,
                "timings": self.result.timings,
                "protected": self.protected,
                "watching": self.watching.state(),
                "stopped_at": self.result.stopped_at,
                "scalers": {side: scaler.state_dict() for side, scaler in self.scalers.items()},
                "forgetting": plain(self.forgetting),
                "method": self.method.state(),
                "batches": self.ranks.gather_objects({name: length(s.data) for name, s in self.streams.items()}),
                "streams": self.ranks.gather_objects({name: s.position() for name, s in self.streams.items()}),
                "rng": self.ranks.gather_objects(rng.capture(self._roots())),
            },
            self.ranks,
            self.ranks.from_first(self._written()),
        )
        if limit is not None and self.ranks.first:
            checkpoints.keep_newest(self.directory, limit, self.run_id, self.iteration)

    def _written(self) -> list[str]:
        """Non-persistent buffers that the run has written to: not the tables and masks that it only reads."""
        now = unsaved_sums(self.model)
        self.written |= {name for name, value in now.items() if value != self.unsaved.get(name)}
        return sorted(self.written & now.keys())

    def _models(self) -> dict[str, nn.Module]:
        """With the one whose weights the run started with, where they are needed: a model that resumes has moved on."""
        original = self.teachers.get("original")
        return {"model": self.model} | ({} if original is None else {"teacher": original})

    def _finish(self) -> None:
        result, mask = self.result, self.result.mask
        result.timings["unlearning"] = self.seconds
        result.ema = None if self.averages is None else self.averages.tensors
        trainable = sum(p.numel() for p in self.parameters)
        result.counts = {
            **self.counts,
            "trainable_weights": trainable,
            "salient_weights": mask.kept if mask else trainable,
        }
        result.warnings |= self.watching.sentences()
        result.forget_eval = self.watching.look
        if mask is None or not self.method.protect:
            result.protection = "protection was not asked for: decay and momentum may move every weight"
        elif not self._fully_protected():
            result.protection = "protected within forget steps only: retain steps move every weight"
        else:
            bits = self.optimizer.mask_bits
            count = protected_count(self.parameters, bits)
            changed = [
                name
                for (name, _), before, after in zip(
                    self.named, self.protected, protected_hashes(self.parameters, bits), strict=True
                )
                if before != after
            ]
            if changed:
                raise ProtectionError(f"protected weights of {changed[0]} have changed: something else wrote to them")
            result.moved_protected = 0
            result.protection = f"0 of {count} protected weights moved; buffers such as BatchNorm's are not weights"
