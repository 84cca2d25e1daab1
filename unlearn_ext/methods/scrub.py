"""SCRUB: away from the original network on what is forgotten, beside it on what is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ..errors import InputError
from ..utils.arguments import check_count, check_finite, check_number
from .base import Method
from .row import Row
from .values import ForgetLoss

__all__ = ["Scrub"]


@dataclass(kw_only=True)
class Scrub(Method):
    r"""SCRUB, arXiv 2302.09880.

    With d the distance to the original network (:math:`T^2 \mathrm{KL}` of softened predictions, or the squared error
    of noise predictions): each of the first ``msteps`` epochs begins with a pass over the forget set that ascends the
    mean of d, and every epoch makes a pass over the retain set that descends :math:`\gamma l + \alpha d`. At the
    original weights d has no gradient: the first forget pass goes where batch normalisation or dropout lead it, and a
    network without either starts at its second.

    Args:
        epochs: passes over the retain set.
        msteps: of them, those that begin with a forget pass.
        retain_loss_weight: γ.
        distance_weight: α.
        temperature: T, for classifiers.

    An iteration is one step, of either kind. How many there are follows from the passes and the data: ``iterations``
    is no argument here, and ``forget_freq`` stays 1.
    """

    name: ClassVar[str] = "scrub"
    row: ClassVar[Row] = Row(
        saliency="every weight",
        forget_term="−distance to the original, in the first msteps epochs",
        retain_term="γ mean loss + α distance to the original",
        geometry="a forget pass, then a retain pass, each epoch",
        source="arXiv 2302.09880",
    )
    forget_teacher: ClassVar[str | None] = "original"
    retain_teacher: ClassVar[str | None] = "original"
    # As reported for CIFAR-10 with 10 % forgotten, and by SFR-on's authors.
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar10-resnet18": {
            "rule": "momentum",
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "lr": 5e-4,
            "retain_loss_weight": 1.0,
            "distance_weight": 0.5,
            "temperature": 2.0,
            "msteps": 3,
            "epochs": 10,
        },
        "cifar10-resnet18-sharp": {
            "rule": "momentum",
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "lr": 8e-5,
            "retain_loss_weight": 0.99,
            "distance_weight": 0.001,
            "temperature": 4.0,
            "msteps": 2,
            "epochs": 6,
        },
    }

    lr: float = 5e-4
    iterations: int = field(default=1000, init=False)  # until a run begins
    epochs: float | None = 10
    msteps: int = 3
    retain_loss_weight: float = 1.0
    distance_weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("epochs", self.epochs)
        check_count("msteps", self.msteps)
        check_finite("retain_loss_weight", self.retain_loss_weight)
        check_finite("distance_weight", self.distance_weight)
        check_number("temperature", self.temperature, "a finite number above 0", lambda x: 0.0 < x < math.inf)
        if self.msteps > self.epochs:
            raise InputError(f"msteps: expected at most the {self.epochs} epochs, got {self.msteps}")
        if self.update == "joint" or self.forget_freq != 1:
            raise InputError("scrub makes passes over one set at a time: leave update and forget_freq out")
        self._passes = (1, 1)  # iterations of a forget and of a retain pass

    def begin(self, passes: Mapping[str, int | None]) -> None:
        forget, retain = (self._pass(name, passes) for name in ("forget", "retain"))
        self._passes = forget, retain
        self.iterations = self._iterations_of(retain, others=self.msteps * forget)

    def forgets_at(self, iteration: int) -> bool:
        forget, retain = self._passes
        epoch, within = divmod(iteration, forget + retain)
        return epoch < self.msteps and within < forget

    def retains_at(self, iteration: int) -> bool:
        return not self.forgets_at(iteration)

    def distance_settings(self, side: str) -> dict[str, Any]:
        return {"temperature": self.temperature}

    def strength(self, iteration: int) -> float:
        return 1.0

    def forget_loss(self, losses: Tensor, iteration: int, distances: Tensor) -> ForgetLoss:
        return ForgetLoss(-distances.mean())

    def retain_loss(self, losses: Tensor, iteration: int, distances: Tensor) -> Tensor:
        return self.retain_loss_weight * losses.mean() + self.distance_weight * distances.mean()
