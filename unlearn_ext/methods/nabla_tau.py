"""Nabla tau: the forget loss rises to that of unseen data, and no further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..utils.arguments import check_number
from .base import Method
from .row import Row
from .values import ForgetLoss

__all__ = ["NablaTau"]


@dataclass(kw_only=True)
class NablaTau(Method):
    r"""∇τ, arXiv 2403.14339: joint descent of
    :math:`\alpha_t \, \mathrm{ReLU}(\tau - L_f)^2 + (1 - \alpha_t) L_r`, L being means over a batch.

    τ is the mean loss on unseen data (``run(unseen=...)``), measured in eval mode at the start of every pass over the
    retain set. Once the forget loss has reached it nothing more is forgotten. α falls to 0, linearly.

    Args:
        forget_alpha: α at the start; None: 5/3 of the forget set's share of all samples, at most 1.
    """

    name: ClassVar[str] = "nabla_tau"
    row: ClassVar[Row] = Row(
        saliency="every weight",
        forget_term="α_t ReLU(τ − mean loss)², τ the mean loss on unseen data",
        retain_term="(1 − α_t) mean loss",
        geometry="joint: both gradients at the same weights",
        source="arXiv 2403.14339",
    )
    needs_unseen: ClassVar[bool] = True
    adds_up: ClassVar[bool] = False
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar10-resnet18": {"rule": "adamw", "lr": 1e-4, "weight_decay": 1e-4, "epochs": 10},
    }

    rule: str = "adamw"
    lr: float = 1e-4
    weight_decay: float = 1e-4
    update: str = "joint"
    forget_alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.forget_alpha is not None:
            check_number("forget_alpha", self.forget_alpha, "a number from 0 to 1, or None", lambda x: 0.0 <= x <= 1.0)
        self._alpha = self.forget_alpha or 0.0
        self._period = 1
        self._tau: float | None = None

    def begin(self, passes: Mapping[str, int | None]) -> None:
        super().begin(passes)
        self._tau, self._period = None, self._pass("retain", passes)
        if passes.get("forget") is not None:  # batches; samples, once they are counted (not in a resumed run)
            self._share(passes["forget"], self._period)

    def take_sizes(self, sizes: Mapping[str, int]) -> None:
        self._share(sizes["forget"], sizes["retain"])

    def _share(self, forget: int, retain: int) -> None:
        if self.forget_alpha is None:
            self._alpha = min(1.0, 5 / 3 * forget / (forget + retain))

    def unseen_at(self, iteration: int) -> bool:
        return iteration % self._period == 0

    def take_unseen(self, loss: float) -> None:
        self._tau = loss

    def state(self) -> dict[str, Any]:
        return {"tau": self._tau, "alpha": self._alpha}

    def load_state(self, state: dict[str, Any]) -> None:
        self._tau, self._alpha = state["tau"], state.get("alpha", self._alpha)

    def strength(self, iteration: int) -> float:
        return self._alpha * (1.0 - iteration / self.iterations)

    def forget_loss(self, losses: Tensor, iteration: int) -> ForgetLoss:
        return ForgetLoss(self.strength(iteration) * (self._tau - losses.mean()).clamp(min=0.0) ** 2)

    def retain_loss(self, losses: Tensor, iteration: int) -> Tensor:
        return (1.0 - self.strength(iteration)) * losses.mean()
