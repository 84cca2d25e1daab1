"""What the unlearner asks of a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from ..errors import InputError
from ..optim import StepConfig
from ..saliency import SaliencyMask
from . import schedules

__all__ = ["ForgetLoss", "Method"]


@dataclass
class ForgetLoss:
    """A forget batch's scalar to minimise, and what the history shows of it (0-d tensors, read at log points)."""

    loss: Tensor
    largest_share: Tensor | None = None


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
        mask: which weights forgetting may move.
    """

    name: ClassVar[str]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    iterations: int = 1000
    lr_schedule: str = "constant"
    forget_freq: int = 1
    update: str = "sequential"
    mask: SaliencyMask | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise InputError(f"iterations: expected a count from 1, got {self.iterations}")
        if self.forget_freq < 1:
            raise InputError(f"forget_freq: expected a count from 1, got {self.forget_freq}")
        if self.update not in ("sequential", "joint"):
            raise InputError(f"update: expected sequential or joint, got {self.update!r}")
        if self.update == "joint" and (self.dual_state or self.forget_lr is not None):
            raise InputError(
                "update='joint' makes one step of both gradients: dual_state and forget_lr do not apply to it"
            )
        if self.protect and self.mask is None and not self.needs_fisher:
            raise InputError("protect=True needs a mask that says what to protect")
        schedules.check("lr_schedule", self.lr_schedule)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Method:
        """Published settings by name; keyword arguments replace single ones."""
        if name not in cls.presets:
            known = ", ".join(cls.presets) or "none"
            raise InputError(f"{cls.__name__} has no preset {name!r}: choose from {known}")
        return cls(**{**cls.presets[name], **overrides})

    def settings(self) -> dict[str, Any]:
        """All arguments but the mask, for results and checkpoints."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "mask"}

    def lr_factor(self, iteration: int) -> float:
        return schedules.factor(self.lr_schedule, iteration, self.iterations)

    def forgets_at(self, iteration: int) -> bool:
        return iteration % self.forget_freq == 0

    @property
    def needs_fisher(self) -> bool:
        """Whether the mask is to be made from two Fisher passes."""
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
