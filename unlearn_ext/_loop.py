"""The iterations of one run: batches become gradients, steps, history and checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _checkpoint, _rng
from ._history import History
from ._modes import evaluating
from ._streams import BatchStream
from .errors import InputError, NonFiniteError, ProtectionError
from .optim import UnlearnOptimizer
from .saliency.protection import protected_count, protected_hashes

if TYPE_CHECKING:
    from .unlearner import Result, Unlearner

__all__ = ["Loop", "Progress"]

Progress = Callable[[str, int, int | None], None]


class _ForgetSide:
    """Lets a GradScaler, which calls ``step()``, make a forget step."""

    def __init__(self, optimizer: UnlearnOptimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self) -> None:
        self.optimizer.forget_step()


class Loop:
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
