"""The iterations of one run: batches become gradients, steps, history and checkpoints."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..data import rng
from ..data.streams import BatchStream, length
from ..distributed.modes import keeping_statistics
from ..distributed.shards import local
from ..distributed.weights import check_same
from ..errors import NonFiniteError, UnlearnError
from ..methods.values import ForgetLoss
from ..optim import UnlearnOptimizer
from ..saliency.protection import check_protected, protected_hashes
from ..utils.plain import plain
from .averages import Averages
from .calibrating import Calibrating
from .checkpoint import Checkpoint, keep_newest, restore, save
from .context import RunContext
from .history import History
from .module_state import unsaved_sums
from .passes import Passes
from .result import Progress, Result
from .signals import Stop
from .steps import Steps
from .teachers import make_teachers
from .watching import Watching

__all__ = ["Loop"]

# What a history entry tells of a forget step.
_OF_FORGETTING = ("forget_loss", "alpha", "clip", "largest_share", "forget_skipped")


class Loop:
    """The iterations of one run, and what a checkpoint needs of them. The model is in the modes of the steps all along:
    a change of mode may change weights (adapters that are merged in eval mode), which are read and restored here."""

    def __init__(
        self,
        context: RunContext,
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
        self.context, self.method, self.model, self.ranks = context, context.method, context.model, context.ranks
        self.optimizer, self.result, self.directory, self.progress = optimizer, result, directory, progress
        self.passes = Passes(context, streams, make_teachers(self.model, self.method))
        self.streams = self.passes.streams
        self.steps = Steps(context, optimizer)
        self.named = optimizer.named_parameters()
        self.parameters = [p for _, p in self.named]
        self.unsaved, self.written = unsaved_sums(self.model), set()
        self.history = History(directory if self.ranks.first else None, result.history)
        self.forgetting: dict[str, Any] = {}  # of the last forget step that no entry has shown yet
        self.iteration = 0
        self.checked = 0  # iterations whose gradients are known to be finite
        self.forgot = False  # whether this iteration has made its forget step
        self.seconds = 0.0
        self.stops_every = self.method.iterations  # between two moments at which the run may be over
        self.counts = {"iterations": 0, "forget_steps": 0, "retain_steps": 0}
        decay = context.ema_decay
        self.averages = None if decay is None else Averages(context.named, decay)
        calibration = self.method.calibration
        self.calibrating = (
            None if calibration is None else Calibrating(self.passes, calibration, self.parameters, self.averages)
        )
        self.protected: list[int] | None = None
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.watching = Watching(self.passes, self.parameters, retained, looks=calibration is None)

    def _fully_protected(self) -> bool:
        every_step = self.method.mask_scope == "all" or not self.method.retains
        return self.result.mask is not None and self.method.protect and every_step

    def start(self, checkpoint: Checkpoint | None) -> None:
        self.steps.clear()
        if checkpoint is None:
            self.passes.begun = True  # by the first pass
            self.run_id = self.ranks.from_first(uuid.uuid4().hex)
            with self.ranks.together():
                self.history.begin()
            self.watching.start()
            if self._fully_protected():
                self.protected = protected_hashes(self.parameters, self.optimizer.mask_bits)
            return
        self._resume(checkpoint)

    def _resume(self, checkpoint: Checkpoint) -> None:
        document = checkpoint.document
        self.passes.seek(checkpoint)
        averages = None if self.averages is None else self.averages.tensors
        restore(checkpoint, self._models(), self.optimizer, averages)
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
        for side, scaler in self.steps.scalers.items():
            scaler.load_state_dict(document["scalers"][side])
        home = None if self.directory is None else self.directory.resolve()
        with self.ranks.together():
            self.history.go_on(checkpoint.history, own=checkpoint.path.resolve().parent == home)
        self.passes.restore_generators(document["rng"])

    def run(self, checkpointing_steps, checkpoints_total_limit, evaluate, evaluate_every, log_every) -> None:
        method, result = self.method, self.result
        self.passes.buffers = self.passes.versions()  # as the first step of this process meets them
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
                if (logs or self.ranks.size == 1) and self.stop.on_any_rank(self.context.device):
                    self._end(saved, limit)
            self.stop.waits = False
            if self.calibrating is not None:
                result.calibration = self.calibrating.finish(self.iteration)
            self.watching.finish()
        except Exception as error:  # NaN may come as an error of the model's or of torch's anomaly mode
            rescued = error if self.calibrating is None else self.calibrating.rescue(error)
            if rescued is error:
                raise
            raise rescued from None
        finally:
            self.stop.waits = False
            self.steps.clear()
        check_same(self.model, self.passes.forms)
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
        keep, verdict = self.passes.evaluate(evaluate, self.iteration)
        self.steps.clear()
        if keep:
            entry["evaluation"] = verdict
        return verdict is True, time.perf_counter() - started

    def _iterate(self, t: int) -> dict[str, Any]:
        method, optimizer = self.method, self.optimizer
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["initial_lr"] = rate  # forget_lr follows lr through this, as under torch's schedulers
            group["lr"] = rate * method.lr_factor(t)
        entry: dict[str, Any] = dict.fromkeys(
            ("iteration", "forget_loss", "retain_loss", "lr", "alpha", "clip", "largest_share")
        )
        entry.update(iteration=t, lr=optimizer.param_groups[0]["lr"])
        self.passes.remember_buffers()
        self.forgot = False
        try:
            if self.calibrating is not None and t == 0:
                self.calibrating.start()
            if method.unseen_at(t):
                entry["unseen_loss"] = float(self.passes.look(self.passes.unseen.data).mean())
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
            self.passes.restore_buffers()
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
        for number in range(self.context.gradient_accumulation_steps):
            parts, count = self._losses("forget", self.method.forget_teacher)
            losses, forget = parts[0], self.method.forget_loss(parts[0], t, *parts[1:])
            batch = self.passes.over_ranks(forget, losses, count)
            means.append(batch.mean)
            self.watching.see_term(batch.reduced)
            total = total + batch.weight
            loss, share = batch.loss, batch.largest_share
            if number > 0:
                part = batch.weight / total
                torch._foreach_mul_([local(p.grad) for p in self.parameters if p.grad is not None], 1 - part)
                loss = part * loss
                if share is not None:
                    largest, share = (1 - part) * largest, part * share
            largest = share if largest is None else torch.maximum(largest, share)
            self.steps.backward(loss, batch, "forget")
        alpha = self.method.strength(t) if self.calibrating is None else None  # each sample has its own
        entry.update(forget_loss=torch.stack(means).mean(), alpha=alpha, largest_share=largest)
        if self.method.update == "joint":
            gradients = [p.grad for p in self.parameters]
            if getattr(self.model, "gradient_as_bucket_view", False):  # which the next backward pass writes to
                gradients = [None if gradient is None else gradient.clone() for gradient in gradients]
            self.steps.clear()
            return gradients
        self._step("forget", entry)
        self.passes.remember_buffers()
        return None

    def _losses(self, name: str, teacher: str | None) -> tuple[tuple[Tensor, ...], int]:
        batch = self.streams[name].take()
        if name == "forget":
            self.watching.take(batch, self._may_be_the_last)
        return self.passes.losses(batch, name, teacher)

    def _may_be_the_last(self) -> bool:
        """Whether the run may be over before the next forget step."""
        end = (self.iteration // self.stops_every + 1) * self.stops_every
        later = range(self.iteration + 1, min(end, self.method.iterations))
        return not any(map(self.method.forgets_at, later))

    def _retain(self, t: int, entry: dict[str, Any], forget_grads: list[Tensor | None] | None) -> None:
        method, steps = self.method, self.context.gradient_accumulation_steps
        sides = [("retain", method.retain_loss, method.retain_teacher)]
        if method.learns:  # its gradient is added to the retain gradient
            sides.append(("learn", method.learn_loss, None))
        for name, weigh, teacher in sides:
            means = []
            for _ in range(steps):
                parts, count = self._losses(name, teacher)
                batch = self.passes.over_ranks(ForgetLoss(weigh(parts[0], t, *parts[1:])), parts[0], count)
                means.append(batch.mean)
                self.steps.backward(batch.loss / steps, batch, name)
            entry[f"{name}_loss"] = torch.stack(means).mean()
        if forget_grads is None:
            self._step("retain", entry)
            return
        self.optimizer.joint_step(forget_grads)
        if method.project:
            entry["projection"] = self.optimizer.last_projection
        self.steps.clear()
        self.forgot = True
        self.counts["forget_steps"] += 1
        self.counts["retain_steps"] += 1

    def _raise_if_non_finite(self) -> None:
        first, last, self.checked = self.checked, self.iteration - 1, self.iteration
        try:
            self.optimizer.raise_if_non_finite()
        except NonFiniteError as error:
            where = f"iteration {last}" if first == last else f"iterations {first} to {last}"
            raise NonFiniteError(f"{where}: {error}") from None

    def _step(self, side: str, entry: dict[str, Any]) -> None:
        if self.steps.step(side):
            self.counts[f"{side}_steps"] += 1
            self.forgot |= side == "forget"
        else:
            entry[f"{side}_skipped"] = True

    def _save(self, limit: int | None) -> None:
        self._raise_if_non_finite()
        save(
            self.directory,
            self.run_id,
            self.iteration,
            self._models(),
            self.optimizer,
            self.result.mask,
            {} if self.averages is None else self.averages.tensors,
            self.history.entries,
            {
                "settings": self.context.settings(),
                "masked": self.result.mask is not None,
                "seconds": self.seconds,
                "counts": self.counts,
                "timings": self.result.timings,
                "protected": self.protected,
                "watching": self.watching.state(),
                "stopped_at": self.result.stopped_at,
                "scalers": {side: scaler.state_dict() for side, scaler in self.steps.scalers.items()},
                "forgetting": plain(self.forgetting),
                "method": self.method.state(),
                "batches": self.ranks.gather_objects({name: length(s.data) for name, s in self.streams.items()}),
                "streams": self.ranks.gather_objects({name: s.position() for name, s in self.streams.items()}),
                "rng": self.ranks.gather_objects(rng.capture(self.passes.roots())),
            },
            self.ranks,
            self.ranks.from_first(self._written()),
        )
        if limit is not None and self.ranks.first:
            keep_newest(self.directory, limit, self.run_id, self.iteration)

    def _written(self) -> list[str]:
        """Non-persistent buffers that the run has written to: not the tables and masks that it only reads."""
        now = unsaved_sums(self.model)
        self.written |= {name for name, value in now.items() if value != self.unsaved.get(name)}
        return sorted(self.written & now.keys())

    def _models(self) -> dict[str, nn.Module]:
        """With the one whose weights the run started with, where they are needed: a model that resumes has moved on."""
        original = self.passes.teachers.get("original")
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
        result.warnings |= self.watching.sentences(result, self.iteration, self.counts, max(self.rates))
        result.forget_eval = self.watching.look
        self._prove_protection()

    def _prove_protection(self) -> None:
        result, method = self.result, self.method
        if result.mask is None or not method.protect:
            result.protection = "protection was not asked for: decay and momentum may move every weight"
        elif not self._fully_protected():
            result.protection = "protected within forget steps only: retain steps move every weight"
        else:
            count = check_protected(self.named, self.optimizer.mask_bits, self.protected)
            result.moved_protected = 0
            result.protection = f"0 of {count} protected weights moved; buffers such as BatchNorm's are not weights"
