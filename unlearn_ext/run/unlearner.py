"""The unlearner: one loop for every method and task."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from .. import ops
from ..data.streams import BatchStream, keeps_workers, length, with_own_workers
from ..distributed.modes import PRECISIONS, keeping_modes, set_training, without_float16
from ..distributed.ranks import ALONE, Ranks
from ..distributed.shards import is_sharded
from ..distributed.weights import check_weights
from ..distributed.wrappers import trainable
from ..errors import DamagedError, InputError
from ..methods import Method, find_method
from ..saliency import SaliencyMask
from ..saliency.storage import check_storage, stored
from ..tasks import Task, check_per_sample, check_task
from ..utils.arguments import check_choice, check_count, check_device, check_model, check_number, describe
from ..utils.files import writable_directory
from ..utils.grad_hooks import keeping_graphs
from ..utils.process import in_run_modes, run_modes
from ..utils.reading import explain_open_errors
from ..utils.seal import SEAL
from ..utils.warn import warn
from . import checkpoint as checkpoints
from . import signs
from .checkpoint_folder import candidates, check_folder
from .checks import check_in_backward
from .first_pass import first_pass
from .lock import hold_on_first
from .loop import Loop, Progress
from .module_state import check_storable
from .settings import of_task
from .signals import stop_on_signals
from .summary import summary
from .teachers import check_teachers

__all__ = ["Result", "Unlearner"]

_RANK_SEED = 1_000_003  # between the seeds of two ranks' draws


def _silent(stage: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""


@dataclass(repr=False)
class Result:
    """What a run did.

    Attributes:
        mask: the saliency mask, or None.
        history: one dict per logged iteration: ``iteration`` (from 0), ``forget_loss`` and ``retain_loss`` (batch
            means; forget entries are None where the iteration did not forget), ``lr`` (of the first parameter group),
            ``alpha`` (strength; None where it is calibrated), ``clip`` (factor of the forget gradient),
            ``largest_share`` (of one sample in the forget gradient), ``evaluation`` where an evaluation returned
            something (NaN and infinities in it as None), and, in fp16, ``forget_skipped`` or ``retain_skipped``: True
            where a scaled gradient overflowed and the step was not made, ``clip`` then being None. A method may add
            ``learn_loss``, ``unseen_loss`` (where it was measured), ``calibration`` (a look of the path below) and
            ``projection`` (:attr:`UnlearnOptimizer.last_projection`).
        timings: seconds of ``fisher`` or ``gradients``, ``mask`` and ``unlearning`` (evaluations and checkpoints not
            included).
        counts: iterations, forget_steps and retain_steps that were made, trainable and salient weights.
        moved_protected: protected weights that changed: 0, proven by hash, when every update was masked and
            protected; None when protection was not asked of the whole run.
        protection: the same in words.
        backend: ``native`` or ``python``.
        update: ``sequential`` or ``joint``.
        stopped_at: the iteration after which an evaluation stopped the run, or a calibration met its target; or None.
        calibration: with ``forget_alpha="auto"``: ``path``, the looks at forget and unseen data
            (:class:`~unlearn_ext.methods.calibration.Calibration`), ``ended_at``, the iterations whose weights the
            model has, ``went_back``, whether later ones were given up, and ``met``; else None.
        ema: moving averages of the trained weights by name, where ``ema_decay`` was given; the model itself holds the
            weights of the last iteration. Both are those of an earlier one where a calibration went back to it.
        warnings: one sentence for each thing that was asked and did not happen, or that makes that likely; each is also
            an :class:`~unlearn_ext.UnlearningWarning`. Keys: ``target`` (a calibration's was not met), ``unmoved`` (no
            weight has moved, or forgetting moved nothing), ``retain`` (the retain loss is several times that of the
            starting weights), ``batch_norm`` (a forget batch that seems forgotten in train mode is known in eval mode),
            ``momentum`` (``rule="momentum"`` with 0), ``strength`` (a forget strength of 0), ``unseen`` (unseen data
            hold a class that is to be forgotten) and ``workers`` (what the persistent workers of a loader draw is not
            restored where the run resumes).
        forget_eval: of a model with batch normalisation in train mode, the last forget batch in eval mode after the
            run: ``samples``, mean ``loss`` as in the history's ``forget_loss``, and ``accuracy`` (None where the task
            has none). None for other models, and where a calibration has looked or there are several ranks.
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
    ema: dict[str, Tensor] | None = None
    calibration: dict[str, Any] | None = None
    warnings: dict[str, str] = field(default_factory=dict)
    forget_eval: dict[str, Any] | None = None

    def __repr__(self) -> str:
        """What a notebook's last line shows: a summary of a few lines."""
        return summary(self)


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
        for needed, offered, what in (
            (method.replaces, "replacement_losses", "has no replacement for what is forgotten"),
            (
                method.forget_teacher or method.retain_teacher,
                "losses_and_distances",
                "measures no distance to another network",
            ),
        ):
            if needed and getattr(type(task), offered) is getattr(Task, offered):
                raise InputError(
                    f"{type(task).__name__} {what}: choose a method that needs none"
                    + (", as with forget_term='ascent'," if method.replaces else "")
                    + f" or give the task {offered}"
                )
        if getattr(method, "target_accuracy", None) is not None:
            task.check_accuracy()
        if gradient_accumulation_steps > 1 and not method.adds_up:
            raise InputError(
                f"{method.name} takes a function of a whole batch's losses, which does not add up over batches: "
                "leave gradient_accumulation_steps out, and use larger batches"
            )
        self.model, self.task, self.method = model, task, method
        self.split_batches, self.mixed_precision = split_batches, mixed_precision
        self._half = PRECISIONS[mixed_precision]
        self._asked_device = device
        self._read_model()

    def _read_model(self) -> None:
        """What of the model a run depends on. Every run reads it anew: layers may have been replaced since, frozen or
        moved."""
        check_weights(self.model)
        self._of_task = of_task(self.task)  # now: a run may change what its functions enclose
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
        self._named = list(trainable(self.model).items())
        self.device = self._named[0][1].device
        self.ranks = Ranks.of(self.model)
        self._check_ranks(self.mixed_precision)
        check_teachers(self.model, method, self.ranks)

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
        if checkpointing_steps is not None and output_dir is None:
            raise InputError("checkpointing_steps needs an output_dir to write to")
        if (checkpointing_steps is not None or resume_from_checkpoint is not None) and self._calibrated:
            raise InputError(
                "a calibrated run keeps its best point in memory and makes no checkpoints: leave checkpointing_steps "
                "and resume_from_checkpoint out, or give forget_alpha a number"
            )
        if self.fisher_storage == "disk" and output_dir is None:
            raise InputError("fisher_storage='disk' needs an output_dir to write to")
        for name, count in (
            ("checkpointing_steps", checkpointing_steps),
            ("checkpoints_total_limit", checkpoints_total_limit),
            ("evaluate_every", evaluate_every),
            ("log_every", log_every),
        ):
            if count is not None or name == "log_every":
                check_count(name, count)
        if evaluate is not None and evaluate_every is None:
            raise InputError("evaluate needs evaluate_every, the iterations between two calls")
        if checkpointing_steps is not None or resume_from_checkpoint is not None:
            self._check_settings()
        self._read_model()
        sets = self._sets(forget=forget, retain=retain, learn=learn, unseen=unseen)
        with self.ranks.together():
            directory = None if output_dir is None else writable_directory(output_dir)
            self._check_loaders(*sets.values())
        counts = {name: length(data) for name, data in sets.items()}
        lengths = self.ranks.gather_objects([counts[name] for name in sets if name != "unseen"])
        if any(other != lengths[0] for other in lengths):
            raise InputError(
                f"the ranks have forget and retain sets of {lengths} batches: give all of them as many, since they "
                "take every step together"
            )
        steps = self.gradient_accumulation_steps
        self.method.begin({name: count if count is None else -(-count // steps) for name, count in counts.items()})
        if progress is None or not self.ranks.first:
            progress = _silent
        if not self.split_batches and self.ranks.size > 1:
            for generator in self.task.generators():
                seed = self.ranks.from_first(generator.initial_seed())
                generator.manual_seed(seed + _RANK_SEED * self.ranks.rank)
        alike = self.ranks if self.split_batches else ALONE
        streams = {name: BatchStream(name, data, alike) for name, data in sets.items()}
        result = Result(update=self.method.update, backend=ops.backend(self.device))
        said = set() if self.ranks.first else set(signs.KEYS)
        if self.method.has_idle_momentum:
            result.warnings["momentum"] = signs.IDLE_MOMENTUM
        if self.method.has_idle_forgetting:
            result.warnings["strength"] = signs.IDLE_FORGETTING
        living = [name for name, data in sets.items() if keeps_workers(data)]
        if living and (checkpointing_steps is not None or resume_from_checkpoint is not None):
            result.warnings["workers"] = signs.drawing(living, resumed=resume_from_checkpoint is not None)
        signs.announce(result.warnings, said)
        with (
            self.ranks.watched(),
            keeping_graphs(self.optimizer_in_backward),
            stop_on_signals(self.ranks) as stop,
            hold_on_first(directory, self.ranks),
        ):
            checkpoint, retained = self._prepare_folder(directory, resume_from_checkpoint, checkpointing_steps), []
            if checkpoint is None:
                if self.method.mask is not None:
                    self.method.mask.check_model(self._named)
                with contextlib.ExitStack() as kept:
                    result.mask, retained = first_pass(
                        self,
                        sets,
                        result,
                        allow_duplicates,
                        progress,
                        lambda sums: kept.enter_context(stored(sums, self.fisher_storage, directory)),
                    )
            else:
                result.mask = checkpoint.mask
            signs.announce(result.warnings, said)
            optimizer = self.method.make_optimizer(self.method.groups(self._named), result.mask)
            for group in optimizer.param_groups:  # copies of a weight have to be rounded alike
                group["rounding_seed"] = self.ranks.from_first(group["rounding_seed"])
            with keeping_modes(self.model):
                set_training(self.model, self.method.freeze_batch_norm)
                loop = Loop(self, optimizer, streams, result, directory, progress, stop, retained)
                del retained  # the loop drops them after its look
                loop.start(checkpoint)
                loop.run(checkpointing_steps, checkpoints_total_limit, evaluate, evaluate_every, log_every)
        signs.announce(result.warnings, said)
        return result

    def _prepare_folder(
        self, directory: Path | None, resume: str | Path | None, checkpointing_steps: int | None
    ) -> checkpoints.Checkpoint | None:
        """The checkpoint to go on from, in a folder that may be written to."""
        if checkpointing_steps is not None:
            check_storable(self.model)
        checkpoint = None if resume is None else self.open_checkpoint(directory, resume)
        with self.ranks.together():
            if directory is not None:
                check_folder(directory, None if checkpoint is None else checkpoint.document["run"])
        return checkpoint

    def open_checkpoint(self, directory: Path | None, resume: str | Path) -> checkpoints.Checkpoint:
        """Reads the checkpoint that ``resume`` names, or the newest that is not damaged; nothing is changed.

        Raises:
            InputError: there is none, or it is of a run with other settings, weights or mask.
            DamagedError: it is damaged, or all of them are.
        """
        with self.ranks.together():
            paths = candidates(directory, resume)
        paths = self.ranks.from_first(paths)
        first: DamagedError | None = None
        for path in paths:
            try:
                checkpoint = self.read_checkpoint(path)
            except DamagedError as error:
                first = first or error
                continue
            if first is not None:
                what = str(first).partition("; resume")[0]
                warn(f"{what}; the run goes on from {path.name}")
            return checkpoint
        if len(paths) > 1:
            raise DamagedError(f"{str(first).partition('; resume')[0]}, and so are all others: start the run again")
        raise first

    def read_checkpoint(self, path: Path) -> checkpoints.Checkpoint:
        """Reads the whole of it; nothing is changed.

        Raises:
            InputError: it is damaged, or of a run with other settings, weights or mask.
        """
        self._read_model()
        with self.ranks.together(), explain_open_errors(path / SEAL):
            if self.ranks.first:
                checkpoints.verify(path)
        with self.ranks.together(), explain_open_errors(path / SEAL):
            found = checkpoints.read(path, self.ranks)
            names = [name for name, _ in self._named]
            defaults = self.method.defaults()
            settings = {**self.settings(), **self._other_length(found)}
            checkpoints.check(found, self.model, names, settings, defaults, self.method.mask)
        return found

    def _other_length(self, checkpoint: checkpoints.Checkpoint) -> dict[str, Any]:
        """Settings that say how long the saved run was, where what it did so far does not hang on them: the run can be
        continued for more iterations or fewer."""
        method, document = copy.copy(self.method), checkpoint.document  # a resume that is refused leaves no trace
        saved = {name: document["settings"].get(name) for name in ("iterations", "epochs")}
        now, done = method.iterations, document["iteration"]
        same = document["settings"].get("method") == type(method).__name__
        if saved["iterations"] in (None, now) or not same:
            return {}
        if now < done:
            raise InputError(f"{checkpoint.path} is of iteration {done}, and the method makes {now}: raise iterations")
        method.load_state(document["method"])
        course = [(method.lr_factor(t), method.strength(t)) for t in range(done)]
        method.iterations = saved["iterations"]
        before = [(method.lr_factor(t), method.strength(t)) for t in range(done)]
        if course != before:
            schedules = [f"{k}={v!r}" for k, v in method.settings().items() if k.endswith("_schedule")]
            raise InputError(
                f"{checkpoint.path} was written with iterations={saved['iterations']} and the method has {now}, and "
                f"its rates depend on how many there are ({', '.join(schedules)}): resume with as many, or start anew "
                "from the weights that the run left"
            )
        return saved

    def settings(self) -> dict[str, Any]:
        """What a run must have in common with the one that it resumes."""
        method = {"method": type(self.method).__name__, **self.method.settings()}
        return {
            **method,
            **self._of_task,
            "mixed_precision": self.mixed_precision,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "ema_decay": self.ema_decay,
            "split_batches": self.split_batches,
            **self.identity,
        }

    def _check_settings(self) -> None:
        """Whether a checkpoint can hold them."""
        for name, value in self.settings().items():
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                raise InputError(
                    f"{name}: a checkpoint cannot hold {value!r}, of type {type(value).__name__}: give a number, a "
                    "text, or lists and dicts of them, or leave checkpointing_steps out"
                ) from None

    @property
    def _calibrated(self) -> bool:
        return getattr(self.method, "calibration", None) is not None

    @contextlib.contextmanager
    def fisher_autocast(self) -> Iterator[None]:
        with self.autocast(), without_float16(self.device.type):
            yield

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        # Steps make its half copies of weights stale, and torch drops them only where no other autocast is around it.
        # Those of a backward pass that computes activations again are dropped before the next forward pass.
        torch.clear_autocast_cache()
        with torch.autocast(self.device.type, dtype=self._half, enabled=self._half is not None):
            yield
        torch.clear_autocast_cache()

    def losses(self, batch: Any, count: int, replacement: bool = False) -> Tensor:
        """Of a prepared batch of ``count`` samples; 0: of one, that counts nothing."""
        with self.autocast():
            losses = (self.task.replacement_losses if replacement else self.task.losses)(self.model, batch)
        check_per_sample(losses, max(count, 1))
        return losses

    def hits(self, batch: Any, count: int) -> Tensor:
        with self.autocast():
            hits = self.task.hits(self.model, batch)
        check_per_sample(hits, count, "hits")
        return hits

    def losses_and_distances(self, batch: Any, count: int, teacher: nn.Module, side: str) -> tuple[Tensor, Tensor]:
        with self.autocast():
            settings = self.method.distance_settings(side)
            losses, distances = self.task.losses_and_distances(self.model, teacher, batch, **settings)
        check_per_sample(losses, max(count, 1))
        check_per_sample(distances, max(count, 1), "distance")
        return losses, distances

    def _sets(self, **given: Iterable[Any] | None) -> dict[str, Iterable[Any]]:
        """Those that were given, which have to be those that the method takes."""
        method = self.method
        needed = {"forget": method.forgets, "retain": method.retains, "learn": method.learns}
        needed["unseen"] = method.needs_unseen
        needed["forget"] |= method.measures is not None
        needed["retain"] |= method.measures == "fisher"
        for name, data in given.items():
            what = f"{'an' if name == 'unseen' else 'a'} {name} set"
            if data is None and needed[name]:
                raise InputError(f"{method.name} takes {what}: pass {name}=, a DataLoader or a list of batches")
            if data is not None and name in ("learn", "unseen") and not needed[name]:
                raise InputError(f"{method.name} has no use for {what}: leave {name} out")
        return {name: with_own_workers(data) for name, data in given.items() if data is not None}

    def _check_ranks(self, mixed_precision: str) -> None:
        """What several ranks cannot do."""
        if self.ranks.size == 1:
            return
        if not self.method.adds_up:
            raise InputError(
                f"{self.method.name} takes a function of a whole batch's losses, which does not add up over ranks: "
                "run it in one process"
            )
        if self.method.needs_unseen:
            raise InputError(f"{self.method.name} looks at unseen data in one process: run it in one")
        sharded = any(is_sharded(p) for _, p in self._named)
        if sharded and self.method.measures == "gradient":
            raise InputError(
                f"{self.method.name} ranks the gradients of whole weights, and these are sharded: measure in one "
                "process or with DistributedDataParallel, or pass a mask"
            )
        if mixed_precision == "fp16" and sharded:
            raise InputError("fp16 is not supported for sharded weights: use bf16 or no")
        if self.optimizer_in_backward:
            raise InputError(
                "optimizer_in_backward is for one process: several reduce their gradients after the hooks of the "
                "backward pass; leave it out, and shard the model to save memory"
            )
        if self.fisher_storage != "device":
            raise InputError("fisher_storage is for one process: leave it out, and shard the model to save memory")

    def _check_loaders(self, *data: Iterable[Any]) -> None:
        """Whether loaders that give each rank samples of its own are taken for such that give whole batches."""
        if self.ranks.size == 1 or not self.split_batches:
            return
        for loader in data:
            samplers = (
                getattr(loader, "sampler", None),
                getattr(getattr(loader, "batch_sampler", None), "sampler", None),
            )
            shards = type(loader).__name__ in ("DataLoaderShard", "DataLoaderDispatcher")  # accelerate's
            if shards or any(isinstance(sampler, DistributedSampler) for sampler in samplers):
                raise InputError(
                    "the loaders give each rank samples of its own: set split_batches=False, or pass loaders that give "
                    "every rank the whole batches"
                )
