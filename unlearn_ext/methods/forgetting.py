"""Methods that minimise a forget term: its kinds, and a strength that sets itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import InputError
from ..utils.arguments import check_choice, check_finite
from . import schedules
from .base import Method
from .calibration import AUTO, Calibration, TargetAccuracy, UnseenLosses
from .values import ForgetLoss

__all__ = ["Forgetting"]


@dataclass(kw_only=True)
class Forgetting(Method):
    """A method whose forget term has a strength.

    Args:
        forget_alpha: the strength at the start; or ``"auto"`` where the method ascends the forget set's losses: they
            are brought to where those of unseen data (``run(unseen=...)``) stand, each sample with a strength of its
            own in the place of the method's weights, and the run goes back to the best point met:
            :mod:`unlearn_ext.methods.calibration`.
        forget_schedule: its course over the run, as ``lr_schedule``; ``"auto"`` has its own.
        target_accuracy: with ``"auto"``: bring the forget set's accuracy to this number from 0 to 1 instead; 0 forgets
            a class. Unseen data are then of the classes that stay.
        calibrate_every: with ``"auto"``, iterations between two looks at both sets in eval mode; None: as many looks
            as keep their cost within a fifth of the training's, but one at the start and one at the end in any case.
        calibration_samples: that such a look counts of each set, at most.
    """

    # Whether the forget term is the ascent of losses, which can be calibrated.
    ascends: ClassVar[bool] = False

    forget_alpha: float | str = 1.0
    forget_schedule: str = "constant"
    target_accuracy: float | None = None
    calibrate_every: int | None = None
    calibration_samples: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("forget_schedule", self.forget_schedule, schedules.SCHEDULES)
        self.calibration: Calibration | None = None
        if self.forget_alpha != AUTO:
            if isinstance(self.forget_alpha, str):
                raise InputError(f"forget_alpha: expected a number or {AUTO!r}, got {self.forget_alpha!r}")
            check_finite("forget_alpha", self.forget_alpha)
            if self.target_accuracy is not None:
                raise InputError(
                    "target_accuracy is what forget_alpha='auto' steers to: set both, or leave target_accuracy out"
                )
            return
        if not self.ascends or self.replaces:
            raise InputError(
                f"forget_alpha='auto' brings ascending losses to those of unseen data, and {self.name} descends "
                "towards a replacement: give a number"
            )
        looks = self.calibrate_every, self.calibration_samples
        if self.target_accuracy is None:
            self.calibration = UnseenLosses(*looks)
        else:
            self.calibration = TargetAccuracy(*looks, self.target_accuracy)
        self.needs_unseen, self.adds_up = True, False

    def ascent(self, losses: Tensor, iteration: int) -> ForgetLoss:
        """Minus the mean loss times the strength; calibrated, minus the mean of each loss times its own."""
        if self.calibration is None:
            return ForgetLoss(-self.strength(iteration) * losses.mean())
        return ForgetLoss(-(self.calibration.strengths(losses) * losses).mean())

    def strength(self, iteration: int) -> float:
        if self.calibration is not None:
            return self.calibration.gain
        return self.forget_alpha * schedules.factor(self.forget_schedule, iteration, self.iterations)
