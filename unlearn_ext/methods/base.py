"""What the unlearner asks of a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import Tensor

from .._arguments import check_count
from ..errors import InputError
from ..optim import StepConfig
from ..saliency import SaliencyMask
from ..saliency.mask import check_fraction
from . import schedules

__all__ = ["Default", "ForgetLoss", "Method"]

MASK_SOURCES = ("gamma", "mask_fraction", "mask")


class Default(float):
    """A number that nobody gave: a default that gives way where a given one would clash."""


@dataclass
class ForgetLoss:
    """A forget batch's scalar to minimise, and what the history shows of it (0-d tensors, read at log points).

    Attributes:
        loss: a weighted mean over the batch.
        largest_share: of one sample in it.
        weight: the sum of the samples' weights, detached, by which this mean counts beside those of other batches when
            gradients are accumulated; None: the number of samples.
    """

    loss: Tensor
    largest_share: Tensor | None = None
    weight: Tensor | None = None


@dataclass(kw_only=True)
class Method(StepConfig, ABC):
    """A method weighs per-sample losses; it knows nothing of batches, models or kernels.

    The optimizer's arguments are inherited from :class:`~unlearn_ext.optim.StepConfig`.

    Args:
        iterations: how many.
        lr_schedule: ``constant``, ``cosine``, ``linear`` or ``quadratic``, over the whole run.
        forget_freq: a forget step on every iteration divisible by this.
        update: ``sequential`` takes the retain gradient at the weights the forget step moved; ``joint`` takes both
            gradients at the same weights and applies them in one pass.
        mask_fraction: measure each weight's saliency as the method does, and let forgetting move this fraction of all
            weights, those of the largest saliency.
        mask: which weights forgetting may move: a ready mask, used instead of measuring.
        param_groups: other settings for some weights: name pattern, as of a file (``*embedding*``; a star stands for
            dots as well), to what a parameter group of :class:`~unlearn_ext.UnlearnOptimizer` may set for itself. The
            first pattern that fits a name has it. A label's own row of an embedding table, which no retained sample
            reads, can take far longer forget steps than weights that all classes share.

    At most one of ``mask_fraction``, ``mask`` and, where the method has it, ``gamma`` may be given.
    """

    name: ClassVar[str]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    iterations: int = 1000
    lr_schedule: str = "constant"
    forget_freq: int = 1
    update: str = "sequential"
    mask_fraction: float | None = None
    mask: SaliencyMask | None = None
    param_groups: dict[str, dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choose_mask_source()
        check_count("iterations", self.iterations)
        check_count("forget_freq", self.forget_freq)
        if self.update not in ("sequential", "joint"):
            raise InputError(f"update: expected sequential or joint, got {self.update!r}")
        if self.update == "joint" and (self.dual_state or self.forget_lr is not None):
            raise InputError(
                "update='joint' makes one step of both gradients: dual_state and forget_lr do not apply to it"
            )
        if self.protect and self.mask is None and not self.needs_fisher:
            raise InputError("protect=True needs a mask that says what to protect")
        self._check_param_groups()
        schedules.check("lr_schedule", self.lr_schedule)

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
            if not self.needs_fisher:
                raise InputError(f"mask_fraction: {type(self).__name__} measures no saliency; give it a ready mask")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Method:
        """Published settings by name; keyword arguments replace single ones, and a mask of any kind the preset's."""
        if name not in cls.presets:
            known = ", ".join(cls.presets) or "none"
            raise InputError(f"{cls.__name__} has no preset {name!r}: choose from {known}")
        preset = dict(cls.presets[name])
        if any(overrides.get(source) is not None for source in MASK_SOURCES):
            preset = {key: value for key, value in preset.items() if key not in MASK_SOURCES}
        return cls(**{**preset, **overrides})

    def settings(self) -> dict[str, Any]:
        """All arguments but the mask, for results and checkpoints."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "mask"}
        return {name: float(value) if isinstance(value, Default) else value for name, value in values.items()}

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

    def lr_factor(self, iteration: int) -> float:
        return schedules.factor(self.lr_schedule, iteration, self.iterations)

    def forgets_at(self, iteration: int) -> bool:
        return iteration % self.forget_freq == 0

    @property
    def needs_fisher(self) -> bool:
        """Whether the mask is to be made from two Fisher passes."""
        return False

    @property
    def replaces(self) -> bool:
        """Whether :meth:`forget_loss` gets the task's replacement losses of a forget batch, not its own."""
        return False

    @abstractmethod
    def strength(self, iteration: int) -> float:
        """The forget term's strength alpha at this iteration."""

    @abstractmethod
    def forget_loss(self, losses: Tensor, iteration: int) -> ForgetLoss:
        """The scalar whose descent forgets, from per-sample losses of a forget batch."""

    def retain_loss(self, losses: Tensor, iteration: int) -> Tensor:
        """The scalar whose descent retains, from per-sample losses of a retain batch."""
        return losses.mean()
