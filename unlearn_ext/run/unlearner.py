"""The unlearner: one loop for every method and task."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import ops
from ..data.streams import BatchStream, keeps_workers, length
from ..distributed.modes import PRECISIONS, keeping_modes, set_training
from ..distributed.ranks import ALONE, Ranks
from ..distributed.weights import check_weights
from ..distributed.wrappers import trainable
from ..errors import InputError
from ..methods import Method, find_method
from ..saliency import SaliencyMask
from ..saliency.storage import check_storage, stored
from ..tasks import Task, check_task
from ..utils.arguments import check_choice, check_count, check_device, check_model, check_number, describe
from ..utils.files import writable_directory
from ..utils.grad_hooks import keeping_graphs
from ..utils.process import in_run_modes, run_modes
from . import signs
from .checkpoint import Checkpoint
from .checkpoint_folder import check_folder
from .checks import (
    check_counts,
    check_in_backward,
    check_loaders,
    check_offers,
    check_ranks,
    check_settings,
    chosen_sets,
)
from .context import RunContext
from .first_pass import first_pass
from .lock import hold_on_first
from .loop import Loop
from .module_state import check_storable
from .result import Progress, Result, silent
from .resuming import open_checkpoint
from .settings import of_task
from .signals import stop_on_signals
from .teachers import check_teachers

__all__ = ["Result", "Unlearner"]

_RANK_SEED = 1_000_003  # between the seeds of two ranks' draws


class Unlearner:
    """Makes a trained model forget, in place.

    A model of bfloat16 weights (``model.to(torch.bfloat16)``) runs without a float32 copy: moments, slow weights and
    Fisher sums are float32, and with the method's ``stochastic_rounding=True`` steps smaller than half a unit in the
    last place are made on average instead of being lost.

    Args:
        model: the trained network; parameters with ``requires_grad=False`` stay as they are.
        task: how its batches become losses.
        method: what to minimise and where; or its name with settings, as
            :func:`unlearn_ext.methods.parse` reads it.
        device: where to run; the model's own device by default.
        mixed_precision: ``no``, ``bf16`` or ``fp16`` autocast for forward and backward passes.
        gradient_accumulation_steps: batches whose gradients make one step. A forget step weighs each by its samples'
            weights, so that it equals the step of one large batch; a retain step counts all batches alike.
        ema_decay: also keep moving averages of the trained weights, ``decay · average + (1 − decay) · weight`` after
            every iteration: :attr:`Result.ema`.
        identity: what else a run must have in common with the one that it resumes, such as a hash of its data.
        split_batches: of a model in DistributedDataParallel or sharded by ``fully_shard``: True, every rank's loaders
            give the same, whole batches, of which it takes its part, so that the result is that of one process; False,
            they give it samples of its own, as with a ``DistributedSampler`` or from ``accelerator.prepare``, and the
            task's draws differ from rank to rank.
        optimizer_in_backward: make each step within its backward pass, and square each gradient for Fisher there:
            about one layer's gradients are alive instead of all, and the weights are the same
            (:meth:`UnlearnOptimizer.step_in_backward`). What is clipped by a norm (``max_norm``, ``retain_max_norm``,
            ``fisher_max_norm``) takes a second backward pass over the same graph. Where nothing is clipped, a gradient
            that is not finite ends the run in mid-step: it goes on from a checkpoint only.
        fisher_storage: where the forget set's Fisher sums wait while the retain set's are measured: ``device``,
            ``host`` (the CPU's memory) or ``disk`` (a safetensors file in ``output_dir``, removed afterwards). The mask
            is the same.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        method: Method | str,
        *,
        device: torch.device | str | None = None,
        mixed_precision: str = "no",
        gradient_accumulation_steps: int = 1,
        ema_decay: float | None = None,
        identity: dict[str, str] | None = None,
        split_batches: bool = True,
        optimizer_in_backward: bool = False,
        fisher_storage: str = "device",
    ):
        check_model(model)
        check_task(task)
        method = find_method(method)
        check_choice("mixed_precision", mixed_precision, PRECISIONS)
        if mixed_precision == "fp16" and method.update == "joint":
            raise InputError("update='joint' adds two gradients of different loss scales in fp16: use bf16 or no")
        gradient_accumulation_steps = check_count("gradient_accumulation_steps", gradient_accumulation_steps)
        if ema_decay is not None:
            ema_decay = check_number("ema_decay", ema_decay, "a number from 0, below 1", lambda x: 0.0 <= x < 1.0)
        if optimizer_in_backward:
            check_in_backward(method, mixed_precision, gradient_accumulation_steps)
        self.optimizer_in_backward = optimizer_in_backward
        check_storage("fisher_storage", fisher_storage, gamma=method.needs_fisher and method.mask_fraction is None)
        self.fisher_storage = fisher_storage
        if not (identity is None or isinstance(identity, Mapping)):
            raise InputError(f"identity: expected a dict of names and texts, got {describe(identity)}")
        self.identity = dict(identity or {})
        self.gradient_accumulation_steps, self.ema_decay = gradient_accumulation_steps, ema_decay
        method.check_task(task)
        check_offers(method, task, gradient_accumulation_steps)
        self.model, self.task, self.method = model, task, method
        self.split_batches, self.mixed_precision = split_batches, mixed_precision
        self._asked_device = device
        self.context = self._read_model()

    @property
    def ranks(self) -> Ranks:
        return self.context.ranks

    @property
    def device(self) -> torch.device:
        return self.context.device

    def _read_model(self) -> RunContext:
        """What of the model a run depends on. Every run reads it anew: layers may have been replaced since, frozen or
        moved."""
        check_weights(self.model)
        task_settings = of_task(self.task)  # now: a run may change what its functions enclose
        method, named = self.method, list(trainable(self.model).items())
        if not named:
            raise InputError("the model has no trainable weights: set requires_grad on those that may be moved")
        if method.stochastic_rounding and all(p.dtype != torch.bfloat16 for _, p in named):
            raise InputError(
                "stochastic_rounding is for bfloat16 weights, and the model trains none: convert it with "
                "model.to(torch.bfloat16), or leave it out"
            )
        method.groups(named)  # patterns that fit nothing are refused before anything is measured
        if self._asked_device is not None:
            with run_modes():  # what is moved in inference mode could not be trained
                self.model.to(check_device(self._asked_device))
        named = list(trainable(self.model).items())
        context = RunContext(
            model=self.model,
            task=self.task,
            method=method,
            ranks=Ranks.of(self.model),
            device=named[0][1].device,
            named=named,
            task_settings=task_settings,
            identity=self.identity,
            mixed_precision=self.mixed_precision,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            ema_decay=self.ema_decay,
            split_batches=self.split_batches,
            optimizer_in_backward=self.optimizer_in_backward,
            fisher_storage=self.fisher_storage,
        )
        check_ranks(context)
        check_teachers(self.model, method, context.ranks)
        return context

    # --- The run --------------------------------------------------------------------------------------------

    @in_run_modes
    def run(
        self,
        forget: Iterable[Any] | None = None,
        retain: Iterable[Any] | None = None,
        *,
        learn: Iterable[Any] | None = None,
        unseen: Iterable[Any] | None = None,
        output_dir: str | Path | None = None,
        checkpointing_steps: int | None = None,
        checkpoints_total_limit: int | None = None,
        resume_from_checkpoint: str | Path | None = None,
        evaluate: Callable[[nn.Module, int], Any] | None = None,
        evaluate_every: int | None = None,
        log_every: int = 1,
        allow_duplicates: bool = False,
        progress: Progress | None = None,
    ) -> Result:
        """Forgets ``forget`` and keeps ``retain``.

        Either may be left out where the method makes no steps on it. Both are re-iterables of batches (a DataLoader, a
        list). The first pass over each is in eval mode, for the saliency and to look for samples that stand in both;
        then both start fresh. The iterations are in train mode: a model in eval mode is switched as a whole, one in
        train mode stays as it is, with those of its modules in eval mode that were (a frozen BatchNorm). Afterwards all
        modes are as before.

        Args:
            learn: batches of new data, for a method that learns them while it forgets.
            unseen: batches of data that neither the model was nor the run is trained on, for a method that measures
                its loss there.
            output_dir: for ``history.jsonl`` and checkpoints; one run at a time holds it. The history of an earlier run
                that left no checkpoints is moved aside, to ``history-1.jsonl`` and so on; a directory with checkpoints
                is refused, unless they are those of the run that is resumed.
            checkpointing_steps: write ``checkpoint-<n>`` after every so many iterations.
            checkpoints_total_limit: keep the newest so many; older ones go when a new one is whole.
            resume_from_checkpoint: ``"latest"`` or a path; the run continues as if it had never stopped. Nothing is
                written before all of it is found to fit, and every bit of it to be as it was written; where the latest
                is damaged the one before is taken, with an UnlearningWarning. A checkpoint of the iteration at which an
                evaluation stopped the run is its end: resumed from there it returns at once, with the same result. From
                an earlier one it goes on, and it is for ``evaluate`` to stop it again. The method may have other
                ``iterations``: a run that is over goes on for more, unless a schedule would have taken another course
                so far. Numbers that samplers, loaders, streamed data sets and the task count in attributes are
                restored, as they are after ``evaluate``; those of indexed data sets and of modules, and the order of a
                list that shuffles itself, are not.
            evaluate: called on every rank, of which the first one's word counts, as
                ``evaluate(model, iterations_done)`` in eval mode; True stops the run, anything
                but a bool or None is kept in the history (of keys such as 1 and "1", the second as "1 (str)"). It does
                not disturb the run's random numbers, and gradients that it leaves are dropped. Weights that it
                replaces, freezes, unfreezes, converts or moves end the run with an InputError.
            evaluate_every: iterations between two calls.
            log_every: iterations between two history entries; each one waits for the device. An entry whose
                iteration did not forget shows the last forget step since the entry before.
            allow_duplicates: do not refuse samples that stand in both sets, and do not look for them. With
                ``fisher_batches`` of a method the first pass then ends after so many batches, as large data want it,
                and a bad one behind them is met by the step that takes it.
            progress: called with a stage's name, what is done and what there is in all (None if unknown).

        Raises:
            InputError: data, masks or directories that do not fit.
            NonFiniteError: a loss or gradient is not finite; the step in question changed nothing. In the sequential
                update the forget step of the same iteration may have been made before, and the message says so. With
                ``optimizer_in_backward`` and no clip, a part of the step may have been made, and the message says that.
                A calibrated run that ends in this or another error gives the model the best weights that it met, and
                the message, or a note on it, says which.
            ProtectionError: a weight that every step protects has changed.
            LostRankError: another process of the run has ended.
            WriteError: a history entry or a checkpoint cannot be written: the disk is full, the folder is gone.
            Interrupted, Terminated: SIGINT (Ctrl-C), or SIGTERM or SIGHUP, has come. The iteration was finished, and
                with ``checkpointing_steps`` a checkpoint of it was saved; the message says how to go on. A second
                Ctrl-C does not wait. Only where this is called in the main thread, and nobody else handles the signal.
        """
        saves = checkpointing_steps is not None or resume_from_checkpoint is not None
        self._check_saving(output_dir, checkpointing_steps, saves)
        check_counts(checkpointing_steps, checkpoints_total_limit, evaluate_every, log_every)
        if evaluate is not None and evaluate_every is None:
            raise InputError("evaluate needs evaluate_every, the iterations between two calls")
        context = self.context = self._read_model()
        ranks, method = context.ranks, self.method
        sets = chosen_sets(method, forget=forget, retain=retain, learn=learn, unseen=unseen)
        with ranks.together():
            directory = None if output_dir is None else writable_directory(output_dir)
            check_loaders(context, sets.values())
        self._begin(sets)
        if progress is None or not ranks.first:
            progress = silent
        alike = ranks if self.split_batches else ALONE
        streams = {name: BatchStream(name, data, alike) for name, data in sets.items()}
        result = Result(update=method.update, backend=ops.backend(context.device))
        signs.note_idle(result.warnings, method)
        if saves and (living := [name for name, data in sets.items() if keeps_workers(data)]):
            result.warnings["workers"] = signs.drawing(living, resumed=resume_from_checkpoint is not None)
        said = set() if ranks.first else set(signs.KEYS)
        signs.announce(result.warnings, said)
        with (
            ranks.watched(),
            keeping_graphs(self.optimizer_in_backward),
            stop_on_signals(ranks) as stop,
            hold_on_first(directory, ranks),
        ):
            checkpoint, retained = self._prepare_folder(directory, resume_from_checkpoint, checkpointing_steps), []
            if checkpoint is None:
                result.mask, retained = self._look_first(sets, result, allow_duplicates, progress, directory)
            else:
                result.mask = checkpoint.mask
            signs.announce(result.warnings, said)
            optimizer = method.make_optimizer(method.groups(context.named), result.mask)
            for group in optimizer.param_groups:  # copies of a weight have to be rounded alike
                group["rounding_seed"] = ranks.from_first(group["rounding_seed"])
            with keeping_modes(self.model):
                set_training(self.model, method.freeze_batch_norm)
                loop = Loop(context, optimizer, streams, result, directory, progress, stop, retained)
                del retained  # the loop drops them after its look
                loop.start(checkpoint)
                loop.run(checkpointing_steps, checkpoints_total_limit, evaluate, evaluate_every, log_every)
        signs.announce(result.warnings, said)
        return result

    def _check_saving(self, output_dir: str | Path | None, checkpointing_steps: int | None, saves: bool) -> None:
        """Whether a run can save, or go on from, what it is asked to."""
        if checkpointing_steps is not None and output_dir is None:
            raise InputError("checkpointing_steps needs an output_dir to write to")
        if saves and self.method.calibration is not None:
            raise InputError(
                "a calibrated run keeps its best point in memory and makes no checkpoints: leave checkpointing_steps "
                "and resume_from_checkpoint out, or give forget_alpha a number"
            )
        if self.fisher_storage == "disk" and output_dir is None:
            raise InputError("fisher_storage='disk' needs an output_dir to write to")
        if saves:
            check_settings(self.context.settings())

    def _begin(self, sets: dict[str, Iterable[Any]]) -> None:
        """Tells the method how many batches there are, and ranks with samples of their own to draw apart."""
        ranks, steps = self.context.ranks, self.gradient_accumulation_steps
        counts = {name: length(data) for name, data in sets.items()}
        lengths = ranks.gather_objects([counts[name] for name in sets if name != "unseen"])
        if any(other != lengths[0] for other in lengths):
            raise InputError(
                f"the ranks have forget and retain sets of {lengths} batches: give all of them as many, since they "
                "take every step together"
            )
        self.method.begin({name: count if count is None else -(-count // steps) for name, count in counts.items()})
        if not self.split_batches and ranks.size > 1:
            for generator in self.task.generators():
                seed = ranks.from_first(generator.initial_seed())
                generator.manual_seed(seed + _RANK_SEED * ranks.rank)

    def _look_first(
        self,
        sets: dict[str, Iterable[Any]],
        result: Result,
        allow_duplicates: bool,
        progress: Progress,
        directory: Path | None,
    ) -> tuple[SaliencyMask | None, list[Any]]:
        """The mask, and retain batches to look at before the first step."""
        if self.method.mask is not None:
            self.method.mask.check_model(self.context.named)
        with contextlib.ExitStack() as kept:
            return first_pass(
                self.context,
                sets,
                result,
                allow_duplicates,
                progress,
                lambda sums: kept.enter_context(stored(sums, self.fisher_storage, directory)),
            )

    def _prepare_folder(
        self, directory: Path | None, resume: str | Path | None, checkpointing_steps: int | None
    ) -> Checkpoint | None:
        """The checkpoint to go on from, in a folder that may be written to."""
        if checkpointing_steps is not None:
            check_storable(self.model)
        checkpoint = None if resume is None else open_checkpoint(self.context, directory, resume)
        with self.ranks.together():
            if directory is not None:
                check_folder(directory, None if checkpoint is None else checkpoint.document["run"])
        return checkpoint

    def open_checkpoint(self, directory: Path | None, resume: str | Path) -> Checkpoint:
        """:func:`~unlearn_ext.run.resuming.open_checkpoint` for this model, method and task as they are now."""
        self.context = self._read_model()
        return open_checkpoint(self.context, directory, resume)
