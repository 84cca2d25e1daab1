"""What the unlearner asks of a method."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from ..errors import InputError
from ..optim import StepConfig
from ..saliency import SaliencyMask
from ..saliency.selection import check_fraction
from ..utils.arguments import LARGEST_COUNT, check_choice, check_count, check_number, describe, nearest
from ..utils.plain import plain_numbers
from . import schedules
from .row import Row
from .values import Default, DefaultWord, ForgetLoss, plain_default

if TYPE_CHECKING:
    from ..tasks import Task

__all__ = []
__all__ += [
    "Method",
]


MASK_SOURCES = ("gamma", "mask_fraction", "mask")
_MOMENTUM = 0.9  # as of every published setting
AnyMethod = TypeVar("AnyMethod", bound="Method")

_OBJECTS = ("mask", "random_model")  # arguments that are no settings


@dataclass(kw_only=True)
class Method(StepConfig, ABC):
    """A method weighs per-sample losses; it knows nothing of batches, models or kernels.

    What it asks of a run stands in class attributes: whether it ``forgets``, ``retains`` or ``learns`` (steps on the
    forget, retain and learn sets; ``update="joint"`` needs the first two), the frozen network that each side is
    compared with (``forget_teacher``, ``retain_teacher``: ``original``, the weights that the run starts with, or
    ``random``, drawn anew), and whether it ``needs_unseen`` data. A side with a teacher gets the samples' distances to
    it as a third argument of :meth:`forget_loss` or :meth:`retain_loss`, of the same forward pass as the losses.

    The optimizer's arguments are inherited from :class:`~unlearn_ext.optim.StepConfig`.

    Args:
        rule: as of the optimizer; ``momentum`` unless given.
        momentum: 0.9 where ``rule="momentum"`` (or ``forget_rule``) is given and this is not; 0 where neither is, which
            makes steps of plain gradient descent.
        iterations: how many.
        lr_schedule: ``constant``, ``cosine``, ``linear`` or ``quadratic``, over the whole run.
        epochs: instead of iterations: how many passes over the retain set, or the forget set of a method without
            retain steps.
        forget_freq: a forget step on every iteration divisible by this.
        update: ``sequential`` takes the retain gradient at the weights the forget step moved; ``joint`` takes both
            gradients at the same weights and applies them in one pass.
        mask_fraction: measure each weight's saliency as the method does, and let forgetting move this fraction of all
            weights, those of the largest saliency.
        mask: which weights forgetting may move: a ready mask, used instead of measuring.
        freeze_batch_norm: batch normalisation runs in eval mode: with its running statistics, which do not move.
        batch_norm_statistics: which batches move the running statistics of BatchNorm and SyncBatchNorm (of no other
            norm): ``all``, as in released code, or ``retain``, those of the retain and learn sets. A forget batch is
            normalised by its own statistics either way; but a retrained model's running ones never saw it, and where
            the forget set is a class, statistics up to half of which are that class's cost the others accuracy.
        param_groups: other settings for some weights: name pattern, as of a file (``*embedding*``; a star stands for
            dots as well), to what a parameter group of :class:`~unlearn_ext.UnlearnOptimizer` may set for itself. The
            first pattern that fits a name has it. A label's own row of an embedding table, which no retained sample
            reads, can take far longer forget steps than weights that all classes share.

    At most one of ``mask_fraction``, ``mask`` and, where the method has it, ``gamma`` may be given.
    """

    name: ClassVar[str]
    row: ClassVar[Row]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    forgets: ClassVar[bool] = True
    retains: ClassVar[bool] = True
    learns: ClassVar[bool] = False
    forget_teacher: ClassVar[str | None] = None
    retain_teacher: ClassVar[str | None] = None
    needs_unseen: ClassVar[bool] = False
    # Whether its terms are means over samples, so that parts of a batch may be added up.
    adds_up: ClassVar[bool] = True
    calibration = None  # of a run that sets its own strength

    rule: str = DefaultWord("momentum")
    momentum: float = Default(0.0)
    iterations: int = 1000
    epochs: float | None = None
    lr_schedule: str = "constant"
    forget_freq: int = 1
    update: str = "sequential"
    mask_fraction: float | None = None
    mask: SaliencyMask | None = None
    freeze_batch_norm: bool = False
    batch_norm_statistics: str = "all"
    param_groups: dict[str, dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        self._choose_momentum()
        super().__post_init__()
        self._choose_mask_source()
        check_count("iterations", self.iterations)
        check_count("forget_freq", self.forget_freq)
        if self.epochs is not None:
            check_number("epochs", self.epochs, "a finite number above 0, or None", lambda x: 0.0 < x < math.inf)
        if self.batch_norm_statistics not in ("all", "retain"):
            raise InputError(f"batch_norm_statistics: expected all or retain, got {self.batch_norm_statistics!r}")
        if self.batch_norm_statistics == "retain" and self.freeze_batch_norm:
            raise InputError(
                "freeze_batch_norm=True moves no statistics, whatever the batch: leave batch_norm_statistics out"
            )
        if self.update not in ("sequential", "joint"):
            raise InputError(f"update: expected sequential or joint, got {self.update!r}")
        if self.update == "joint" and (self.dual_state or self.forget_lr is not None):
            raise InputError(
                "update='joint' makes one step of both gradients: dual_state and forget_lr do not apply to it"
            )
        if self.project and self.update != "joint":
            raise InputError("project=True compares both gradients at the same weights: set update='joint'")
        if self.protect and self.mask is None and self.measures is None:
            raise InputError("protect=True needs a mask that says what to protect")
        self._check_sides()
        self._check_param_groups()
        check_choice("lr_schedule", self.lr_schedule, schedules.SCHEDULES)

    def __setattr__(self, name: str, value: Any) -> None:
        # A sweep gives NumPy's numbers and 0-d tensors; results and checkpoints hold Python's.
        super().__setattr__(name, plain_numbers(value) if name in self.__dataclass_fields__ else value)

    def _choose_momentum(self) -> None:
        """Who names the rule and no number means the usual one: with 0 it would be plain gradient descent."""
        if isinstance(self.momentum, Default):
            self.momentum = Default(_MOMENTUM if "momentum" in self._given_rules else 0.0)

    @property
    def _given_rules(self) -> list[str | None]:
        return [self.forget_rule, *([] if isinstance(self.rule, DefaultWord) else [self.rule])]

    @property
    def has_idle_momentum(self) -> bool:
        """Whether rule momentum was given with a momentum of 0, which is plain gradient descent."""
        groups = (self.param_groups or {}).values()
        somewhere = self.momentum or any(settings.get("momentum") for settings in groups)
        return "momentum" in self._given_rules and not somewhere

    @property
    def has_idle_forgetting(self) -> bool:
        """Whether a setting of 0 takes every forget step away, so that the run only trains on what is kept."""
        settings = (getattr(self, name, None) for name in ("forget_alpha", "forget_lr", "forget_weight"))
        return self.forgets and any(setting == 0 for setting in settings)

    def _check_sides(self) -> None:
        if self.forgets and self.retains:
            return
        own, missing = type(self).__name__, "retain" if self.forgets else "forget"
        for needed, why in (
            (
                self.batch_norm_statistics != "all",
                "batch_norm_statistics tells its batches from the other's: leave it out",
            ),
            (self.update == "joint", "update='joint' needs the gradients of both sides"),
            (missing == "retain" and self.slow_rate != 1.0, "slow weights follow at retain steps: set slow_rate=1"),
            (missing == "retain" and self.forget_freq != 1, "between forget steps nothing is done: set forget_freq=1"),
            (missing == "forget" and self.dual_state, "dual_state is a state of forget steps' own: leave it out"),
        ):
            if needed:
                raise InputError(f"{own} has no {missing} term, and {why}")

    def _check_param_groups(self) -> None:
        groups = {} if self.param_groups is None else self.param_groups
        if not isinstance(groups, dict) or not all(
            isinstance(pattern, str) and isinstance(settings, dict) for pattern, settings in groups.items()
        ):
            raise InputError(f"param_groups: expected name patterns with a dict of settings each, got {groups!r}")
        for settings in groups.values():
            self.check_group(settings)
            if self.update == "joint" and settings.get("forget_lr") is not None:
                raise InputError(
                    "param_groups: forget_lr does not apply to update='joint', which makes one step of both gradients"
                )

    def _choose_mask_source(self) -> None:
        found = {name: value for name in MASK_SOURCES if (value := getattr(self, name, None)) is not None}
        given = [name for name, value in found.items() if not isinstance(value, Default)]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} each say which weights are masked: give only one of them")
        for name in found.keys() - given if given else ():
            setattr(self, name, None)
        if self.mask_fraction is not None:
            check_fraction("mask_fraction", self.mask_fraction)
            if self.measures is None:
                raise InputError(f"mask_fraction: {type(self).__name__} measures no saliency; give it a ready mask")

    @classmethod
    def preset(cls: type[AnyMethod], name: str, **overrides: Any) -> AnyMethod:
        """Published settings by name; keyword arguments replace single ones, and a mask of any kind the preset's."""
        if name not in [*cls.presets]:  # a list has no hash
            known = ", ".join(cls.presets) or "none"
            near = nearest(name, cls.presets.keys()) if isinstance(name, str) else None
            hint = f", perhaps {near} is meant" if near else ""
            raise InputError(f"{cls.__name__} has no preset {describe(name)}{hint}: choose from {known}")
        preset = dict(cls.presets[name])
        if any(overrides.get(source) is not None for source in MASK_SOURCES):
            preset = {key: value for key, value in preset.items() if key not in MASK_SOURCES}
        return cls(**{**preset, **overrides})

    def settings(self) -> dict[str, Any]:
        """All arguments but the mask and networks, for results and checkpoints."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _OBJECTS}
        return {name: plain_default(value) for name, value in values.items()}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Of those arguments that have plain ones."""
        found = {field.name: field.default for field in fields(cls) if field.name not in _OBJECTS}
        return {name: value for name, value in found.items() if value is not MISSING and not isinstance(value, Default)}

    def groups(self, named_parameters: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer: weights that no pattern fits, then the groups in the order given.

        Raises:
            InputError: a pattern fits no weight that an earlier one left.
        """
        named, patterns = list(named_parameters), self.param_groups or {}
        found: dict[str | None, list[tuple[str, Tensor]]] = {None: [], **{pattern: [] for pattern in patterns}}
        for name, p in named:
            found[next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)].append((name, p))
        for pattern in patterns:
            if not found[pattern]:
                raise InputError(
                    f"param_groups: {pattern} fits no trained weight that an earlier pattern left; names are like "
                    f"{named[0][0]}"
                )
        return [{"params": chosen, **patterns.get(key, {})} for key, chosen in found.items() if chosen]

    # --- What a run asks --------------------------------------------------------------------------------------

    @classmethod
    def check_task(cls, task: Task) -> None:
        """Raises InputError, with the reason, for a task on which the method cannot work."""
        row = getattr(cls, "row", None)
        if row is not None and task.kind and task.kind not in row.tasks:
            raise InputError(
                f"{cls.name} does not run on {task.kind}, only on {' and '.join(row.tasks)}: {row.otherwise}"
            )

    def begin(self, passes: Mapping[str, int | None]) -> None:
        """Called before a run, with the iterations that one pass over each set takes (None: its loader does not say).

        Raises:
            InputError: ``epochs`` are asked of data without a length.
        """
        if self.epochs is not None:
            self.iterations = self._iterations_of(self._pass("retain" if self.retains else "forget", passes))

    def _iterations_of(self, batches: int, others: int = 0) -> int:
        """Of ``epochs`` passes over so many batches, and of ``others`` beside them."""
        total = self.epochs * batches + others
        if not total <= LARGEST_COUNT:
            raise InputError(f"epochs: {self.epochs:g} passes are more iterations than can be counted; set fewer")
        return max(1, round(total))

    def take_sizes(self, sizes: Mapping[str, int]) -> None:
        """How many samples each set has, once a first pass has seen all of them. A run that resumes makes no first
        pass: what follows from this belongs to :meth:`state`."""

    def _pass(self, name: str, passes: Mapping[str, int | None]) -> int:
        if passes.get(name) is None:
            raise InputError(
                f"{type(self).__name__} counts passes over the {name} set, whose loader has no length: pass one that "
                "has, or a list of batches"
            )
        return passes[name]

    def lr_factor(self, iteration: int) -> float:
        return schedules.factor(self.lr_schedule, iteration, self.iterations)

    def forgets_at(self, iteration: int) -> bool:
        return self.forgets and iteration % self.forget_freq == 0

    def retains_at(self, iteration: int) -> bool:
        return self.retains

    def unseen_at(self, iteration: int) -> bool:
        """Whether the mean loss on unseen data is to be measured before this iteration, for :meth:`take_unseen`."""
        return False

    def take_unseen(self, loss: float) -> None:
        """The mean loss on unseen data, in eval mode, at the weights of the iteration that begins."""

    def state(self) -> dict[str, Any]:
        """What a run has told the method, as JSON, for checkpoints."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state` gave."""

    def distance_settings(self, side: str) -> dict[str, Any]:
        """How distances to the teacher of the ``forget`` or ``retain`` side are measured: keyword arguments of
        :meth:`~unlearn_ext.tasks.Task.losses_and_distances`."""
        return {}

    @property
    def needs_fisher(self) -> bool:
        """Whether the mask is to be made from two Fisher passes."""
        return False

    @property
    def measures(self) -> str | None:
        """What the mask is made from: ``fisher``, two Fisher passes; ``gradient``, the sum of the forget gradients; or
        None, where nothing is measured."""
        return "fisher" if self.needs_fisher else None

    @property
    def replaces(self) -> bool:
        """Whether :meth:`forget_loss` gets the task's replacement losses of a forget batch, not its own."""
        return False

    @abstractmethod
    def strength(self, iteration: int) -> float:
        """The forget term's strength alpha at this iteration."""

    @abstractmethod
    def forget_loss(self, losses: Tensor, iteration: int) -> ForgetLoss:
        """The scalar whose descent forgets, from per-sample losses of a forget batch; with a ``forget_teacher`` also
        from per-sample distances to it, a third argument."""

    def retain_loss(self, losses: Tensor, iteration: int) -> Tensor:
        """The scalar whose descent retains, from per-sample losses of a retain batch; with a ``retain_teacher`` also
        from per-sample distances to it, a third argument."""
        return losses.mean()

    def learn_loss(self, losses: Tensor, iteration: int) -> Tensor:
        """The scalar whose descent learns, from per-sample losses of a learn batch; its gradient is added to the retain
        gradient. Of methods that learn."""
        raise InputError(f"{type(self).__name__} learns nothing")
