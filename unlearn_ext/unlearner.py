"""The unlearner: one loop for every method and task."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _checkpoint, _rng, ops
from ._data import DataCheck
from ._files import writable_directory
from ._hashing import weights_hash
from ._history import History
from ._modes import PRECISIONS, evaluating
from ._names import plain_name
from ._streams import BatchStream
from .errors import InputError, NonFiniteError, ProtectionError
from .methods import Method
from .optim import UnlearnOptimizer
from .saliency import FisherDiagonal, SaliencyMask
from .saliency.protection import protected_count, protected_hashes
from .tasks import Task

__all__ = ["Result", "Unlearner"]

Progress = Callable[[str, int, int | None], None]


@dataclass
class Result:
    """What a run did.

    Attributes:
        mask: the saliency mask, or None.
        history: one dict per logged iteration: ``iteration`` (from 0), ``forget_loss`` and ``retain_loss`` (batch
            means; forget entries are None where the iteration did not forget), ``lr``, ``alpha`` (strength),
            ``clip`` (factor of the forget gradient), ``largest_share`` (of one sample in the forget gradient), and
            ``evaluation`` where an evaluation returned something.
        timings: seconds of ``fisher``, ``mask`` and ``unlearning`` (evaluations and checkpoints not included).
        counts: iterations, forget_steps, retain_steps, trainable and salient weights.
        moved_protected: protected weights that changed: 0, proven by hash, when every update was masked and
            protected; None when protection was not asked of the whole run.
        protection: the same in words.
        backend: ``native`` or ``python``.
        update: ``sequential`` or ``joint``.
        stopped_at: the iteration after which an evaluation stopped the run, or None.
    """

    mask: SaliencyMask | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    moved_protected: int | None = None
    protection: str = ""
    backend: str = ""
    update: str = "sequential"
    stopped_at: int | None = None


def _length(data: Iterable[Any]) -> int | None:
    try:
        return len(data)
    except TypeError:  # no length, or a DataLoader of an IterableDataset without one
        return None


class _ForgetSide:
    """Lets a GradScaler, which calls ``step()``, make a forget step."""

    def __init__(self, optimizer: UnlearnOptimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self) -> None:
        self.optimizer.forget_step()


class Unlearner:
    """Makes a trained model forget, in place.

    Args:
        model: the trained network; parameters with ``requires_grad=False`` stay as they are.
        task: how its batches become losses.
        method: what to minimise and where.
        device: where to run; the model's own device by default.
        mixed_precision: ``no``, ``bf16`` or ``fp16`` autocast for forward and backward passes.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        method: Method,
        *,
        device: torch.device | str | None = None,
        mixed_precision: str = "no",
    ):
        if mixed_precision not in PRECISIONS:
            raise InputError(f"mixed_precision: expected one of {', '.join(PRECISIONS)}, got {mixed_precision!r}")
        if mixed_precision == "fp16" and method.update == "joint":
            raise InputError("update='joint' adds two gradients of different loss scales in fp16: use bf16 or no")
        self.model, self.task, self.method = model, task, method
        self._named = [(plain_name(n), p) for n, p in model.named_parameters() if p.requires_grad]
        if not self._named:
            raise InputError("the model has no trainable weights: set requires_grad on those that may be moved")
        if device is not None:
            model.to(device)
        self.device = self._named[0][1].device
        self._half = PRECISIONS[mixed_precision]

    # --- The run --------------------------------------------------------------------------------------------

    def run(
        self,
        forget: Iterable[Any],
        retain: Iterable[Any],
        *,
        output_dir: str | Path | None = None,
        checkpointing_steps: int | None = None,
        resume_from_checkpoint: str | Path | None = None,
        evaluate: Callable[[nn.Module, int], Any] | None = None,
        evaluate_every: int | None = None,
        log_every: int = 1,
        allow_duplicates: bool = False,
        progress: Progress | None = None,
    ) -> Result:
        """Forgets ``forget`` and keeps ``retain``.

        Both are re-iterables of batches (a DataLoader, a list). The first pass over each is in eval mode, for the
        Fisher diagonals and to look for samples that stand in both; then both start fresh.

        Args:
            output_dir: for ``history.jsonl`` and checkpoints.
            checkpointing_steps: write ``checkpoint-<n>`` after every so many iterations.
            resume_from_checkpoint: ``"latest"`` or a path; the run continues as if it had never stopped.
            evaluate: called as ``evaluate(model, iterations_done)`` in eval mode; True stops the run, anything
                but a bool or None is kept in the history. It does not disturb the run's random numbers.
            evaluate_every: iterations between two calls.
            log_every: iterations between two history entries; each one waits for the device. An entry whose
                iteration did not forget shows the last forget step since the entry before.
            allow_duplicates: do not refuse samples that stand in both sets, and do not look for them.
            progress: called with a stage's name, what is done and what there is in all (None if unknown).

        Raises:
            InputError: data, masks or directories that do not fit.
            NonFiniteError: a loss or gradient is not finite; the step in question changed nothing. In the sequential
                update the forget step of the same iteration may have been made before, and the message says so.
            ProtectionError: a weight that every step protects has changed.
        """
        if checkpointing_steps is not None and output_dir is None:
            raise InputError("checkpointing_steps needs an output_dir to write to")
        for name, count in (
            ("checkpointing_steps", checkpointing_steps),
            ("evaluate_every", evaluate_every),
            ("log_every", log_every),
        ):
            if count is not None and count < 1:
                raise InputError(f"{name}: expected a count from 1, got {count}")
        if evaluate is not None and evaluate_every is None:
            raise InputError("evaluate needs evaluate_every, the iterations between two calls")
        directory = None if output_dir is None else writable_directory(output_dir)
        checkpoint = None
        if resume_from_checkpoint is not None:
            checkpoint = _checkpoint.find(directory, resume_from_checkpoint)
        elif directory is not None and any(directory.glob("checkpoint-*")):
            raise InputError(
                f"{directory} holds checkpoints of an earlier run: resume it (resume_from_checkpoint='latest') or "
                "choose another directory"
            )
        progress = progress or (lambda stage, done, total: None)
        streams = BatchStream("forget", forget), BatchStream("retain", retain)
        result = Result(update=self.method.update, backend=ops.backend(self.device))
        if checkpoint is None:
            result.mask = self._make_mask(forget, retain, result, allow_duplicates, progress)
        else:
            result.mask = _checkpoint.read_mask(checkpoint)
        optimizer = self.method.make_optimizer(self._named, result.mask)
        loop = _Loop(self, optimizer, streams, result, directory, progress)
        loop.start(checkpoint)
        loop.run(checkpointing_steps, evaluate, evaluate_every, log_every)
        return result

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self._half, enabled=self._half is not None)

    def losses(self, batch: Any) -> Tensor:
        with self.autocast():
            return self.task.losses(self.model, batch)

    # --- Before the loop ------------------------------------------------------------------------------------

    def _make_mask(self, forget, retain, result: Result, allow_duplicates: bool, progress: Progress):
        """The first pass over the data: Fisher diagonals where the method needs them, duplicates in any case."""
        method, check = self.method, DataCheck(self.model, self.task, allow_duplicates)
        passes = {"forget": forget, "retain": retain}
        mask = method.mask
        if not method.needs_fisher:
            for name, data in passes.items():
                check.scan(name, data)
            if mask is not None:
                self._check_origin(mask, check)
            return mask
        diagonals: dict[str, FisherDiagonal] = {}
        started = time.perf_counter()
        for name, data in passes.items():
            total = _length(data)
            if allow_duplicates and method.fisher_batches is not None:  # no need to see the rest
                data = itertools.islice(iter(data), method.fisher_batches)
                total = method.fisher_batches if total is None else min(total, method.fisher_batches)
            done = 0

            def watch(batch: Any, name: str = name, total: int | None = total) -> None:
                nonlocal done
                done += 1
                check.add(name, batch)
                progress(f"Fisher, {name} set", done, total)

            # Not in float16: unscaled gradients underflow there, and 0 / 0 would open the mask.
            with self.autocast() if self._half != torch.float16 else contextlib.nullcontext():
                fisher = FisherDiagonal(self.model, self.task, batches=method.fisher_batches)
                diagonals[name] = fisher.measure(data, name=name, watch=watch)
        result.timings["fisher"] = time.perf_counter() - started
        started = time.perf_counter()
        mask = SaliencyMask.from_fisher(
            diagonals["forget"],
            diagonals["retain"],
            gamma=method.gamma,
            mask_fraction=method.mask_fraction,
            eps=method.fisher_eps,
        )
        result.timings["mask"] = time.perf_counter() - started
        mask.metadata.update(
            weights_hash=weights_hash(self._named),
            seed=str(torch.initial_seed()),
            **({"forget_hash": check.forget_hash} if check.forget_hash else {}),
        )
        return mask

    def _check_origin(self, mask: SaliencyMask, check: DataCheck) -> None:
        origins = (
            ("weights_hash", "weights", weights_hash(self._named)),
            ("forget_hash", "forget set", check.forget_hash),
        )
        for key, what, own in origins:
            if own and mask.metadata.get(key, own) != own:
                raise InputError(
                    f"the mask was made for another {what}: measure a new one, or delete mask.metadata[{key!r}] to "
                    "use it all the same"
                )


class _Loop:
    """The iterations of one run, and what a checkpoint needs of them."""

    def __init__(
        self,
        unlearner: Unlearner,
        optimizer: UnlearnOptimizer,
        streams: tuple[BatchStream, BatchStream],
        result: Result,
        directory: Path | None,
        progress: Progress,
    ):
        self.unlearner, self.method, self.model = unlearner, unlearner.method, unlearner.model
        self.optimizer, self.result, self.directory, self.progress = optimizer, result, directory, progress
        self.forget, self.retain = streams
        self.parameters = [p for _, p in unlearner._named]
        self.buffers = list(self.model.buffers())
        self.before: list[Tensor] = []  # the buffers before the step at hand
        self.history = History(directory, result.history)
        self.iteration = 0
        self.forgot = False  # whether this iteration has made its forget step
        self.seconds = 0.0
        self.counts = {"iterations": 0, "forget_steps": 0, "retain_steps": 0}
        scaled = unlearner._half == torch.float16
        self.scaler = torch.amp.GradScaler(unlearner.device.type) if scaled else None
        self.forget_side = _ForgetSide(optimizer)
        self.protected: list[int] | None = None
        self.rates = [group["lr"] for group in optimizer.param_groups]

    def _generators(self) -> list[torch.Generator]:
        found = _rng.generators_of(self.forget.data)
        return found + [g for g in _rng.generators_of(self.retain.data) if all(g is not other for other in found)]

    def _fully_protected(self) -> bool:
        return self.result.mask is not None and self.method.protect and self.method.mask_scope == "all"

    def start(self, checkpoint: Path | None) -> None:
        for p in self.parameters:
            p.grad = None
        if checkpoint is None:
            self.history.clear()
            if self._fully_protected():
                self.protected = protected_hashes(self.parameters, self.optimizer.mask_bits)
            return
        document = _checkpoint.read(checkpoint)
        settings = json.loads(json.dumps(self.method.settings()))
        for key, value in document["settings"].items():
            if settings.get(key) != value:
                raise InputError(
                    f"{checkpoint} was written with {key}={value!r} and the method has {settings.get(key)!r}: resume "
                    "with the same settings"
                )
        _checkpoint.restore(checkpoint, document, self.model, self.optimizer)
        self.iteration, self.seconds, self.counts = document["iteration"], document["seconds"], document["counts"]
        self.protected = document["protected"]
        self.result.timings.update(document["timings"])
        if self.scaler is not None:
            self.scaler.load_state_dict(document["scaler"])
        self.history.keep_until(self.iteration)
        self.forget.seek(document["forget"])
        self.retain.seek(document["retain"])
        _rng.restore(document["rng"], self._generators())

    def run(self, checkpointing_steps, evaluate, evaluate_every, log_every) -> None:
        method, result = self.method, self.result
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.train()
        forgetting: dict[str, Any] = {}  # of the last forget step that no entry has shown yet
        try:
            while self.iteration < method.iterations:
                started = time.perf_counter()
                entry = self._iterate(self.iteration)
                if entry["forget_loss"] is not None:
                    forgetting = {key: entry[key] for key in ("forget_loss", "alpha", "clip", "largest_share")}
                self.iteration += 1
                stop, paused = False, 0.0
                if evaluate is not None and evaluate_every and self.iteration % evaluate_every == 0:
                    stop, paused = self._evaluate(evaluate, entry)
                last = stop or self.iteration == method.iterations
                if last or self.iteration % log_every == 0 or "evaluation" in entry:
                    # The one place that waits for the device, so the clock below is right there as well.
                    self.optimizer.raise_if_non_finite()
                    self.history.add({**entry, **forgetting} if entry["forget_loss"] is None else entry)
                    forgetting = {}
                self.seconds += time.perf_counter() - started - paused
                self.progress("unlearning", self.iteration, method.iterations)
                if checkpointing_steps and self.iteration % checkpointing_steps == 0:
                    self._save()
                if stop:
                    result.stopped_at = self.iteration
                    break
        finally:
            for module, training in modes:
                module.training = training
            for p in self.parameters:
                p.grad = None
        self._finish()

    def _evaluate(self, evaluate: Callable[[nn.Module, int], Any], entry: dict[str, Any]) -> tuple[bool, float]:
        """Whether to stop, and the seconds it took, which are not the run's."""
        started = time.perf_counter()
        generators = self._generators()
        state = _rng.capture(generators)
        with evaluating(self.model):
            verdict = evaluate(self.model, self.iteration)
        _rng.restore(state, generators)
        if getattr(verdict, "ndim", None) == 0:  # a NumPy or PyTorch scalar, as a comparison gives
            verdict = verdict.item()
        if verdict is not None and not isinstance(verdict, bool):
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
            forget_grads = self._forget(t, entry) if method.forgets_at(t) else None
            self._retain(t, entry, forget_grads)
        except NonFiniteError as error:
            for buffer, before in zip(self.buffers, self.before, strict=True):
                buffer.copy_(before)
            made = "; its forget step had been made" if self.forgot else ""
            raise NonFiniteError(f"iteration {t}: {error}{made}") from None
        if entry["forget_loss"] is not None:
            entry["clip"] = optimizer.last_clip
        self.counts["iterations"] += 1
        return entry

    def _forget(self, t: int, entry: dict[str, Any]) -> list[Tensor | None] | None:
        """A forget step; or, for the joint update, only its gradients."""
        losses = self._losses(self.forget)
        forget = self.method.forget_loss(losses, t)
        entry.update(
            forget_loss=losses.detach().mean(), alpha=self.method.strength(t), largest_share=forget.largest_share
        )
        self._backward(forget.loss, entry["forget_loss"], "forget")
        self.counts["forget_steps"] += 1
        if self.method.update == "joint":
            gradients = [p.grad for p in self.parameters]
            self._clear()
            return gradients
        self._step(self.forget_side)
        self.forgot = True
        self._remember_buffers()
        return None

    def _remember_buffers(self) -> None:
        """A batch that is not finite reaches BatchNorm's statistics before its loss tells."""
        self.before = [buffer.clone() for buffer in self.buffers]

    def _retain(self, t: int, entry: dict[str, Any], forget_grads: list[Tensor | None] | None) -> None:
        losses = self._losses(self.retain)
        loss = self.method.retain_loss(losses, t)
        entry["retain_loss"] = losses.detach().mean()
        self._backward(loss, entry["retain_loss"], "retain")
        self.counts["retain_steps"] += 1
        if forget_grads is not None:
            self.optimizer.joint_step(forget_grads)
            self._clear()
        else:
            self._step(self.optimizer)
        if self.scaler is not None:
            self.scaler.update()

    def _losses(self, stream: BatchStream) -> Tensor:
        batch = self.unlearner.task.prepare(stream.take(), self.unlearner.device)
        return self.unlearner.losses(batch)

    def _backward(self, loss: Tensor, mean: Tensor, side: str) -> None:
        if self.unlearner.device.type == "cpu" and not bool(torch.isfinite(loss)):
            raise NonFiniteError(
                f"the {side} loss is {mean.item()} and the step was not made: check the data, lower lr or forget_alpha"
            )
        if not loss.requires_grad:
            raise InputError(f"every gradient is None: no trainable weight takes part in the {side} loss")
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def _step(self, side: UnlearnOptimizer | _ForgetSide) -> None:
        if self.scaler is not None:
            self.scaler.step(side)  # skips the step when a scaled gradient overflowed
        elif side is self.optimizer:
            side.retain_step()
        else:
            side.step()
        self._clear()

    def _clear(self) -> None:
        for p in self.parameters:
            p.grad = None

    # --- After it -------------------------------------------------------------------------------------------

    def _save(self) -> None:
        _checkpoint.save(
            self.directory,
            self.iteration,
            self.model,
            self.optimizer,
            self.result.mask,
            {
                "settings": self.method.settings(),
                "masked": self.result.mask is not None,
                "seconds": self.seconds,
                "counts": self.counts,
                "timings": self.result.timings,
                "protected": self.protected,
                "scaler": None if self.scaler is None else self.scaler.state_dict(),
                "forget": self.forget.position(),
                "retain": self.retain.position(),
                "rng": _rng.capture(self._generators()),
            },
        )

    def _finish(self) -> None:
        result, mask = self.result, self.result.mask
        result.timings["unlearning"] = self.seconds
        trainable = sum(p.numel() for p in self.parameters)
        result.counts = {
            **self.counts,
            "trainable_weights": trainable,
            "salient_weights": mask.kept if mask else trainable,
        }
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
                    self.unlearner._named, self.protected, protected_hashes(self.parameters, bits), strict=True
                )
                if before != after
            ]
            if changed:
                raise ProtectionError(f"protected weights of {changed[0]} have changed: something else wrote to them")
            result.moved_protected = 0
            result.protection = f"0 of {count} protected weights moved; buffers such as BatchNorm's are not weights"
