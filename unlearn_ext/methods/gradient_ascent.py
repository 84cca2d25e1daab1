"""Gradient ascent on what is to be forgotten, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .forgetting import Forgetting
from .row import Row
from .values import ForgetLoss

__all__ = ["GradientAscent"]


@dataclass(kw_only=True)
class GradientAscent(Forgetting):
    """Descent of −α times the mean loss on the forget set, clipped, with batch normalisation in eval mode. Nothing
    holds what is kept: a few steps too many ruin the model."""

    name: ClassVar[str] = "gradient_ascent"
    row: ClassVar[Row] = Row(
        saliency="every weight",
        forget_term="−α mean loss",
        retain_term="none",
        geometry="forget steps alone, clipped; BatchNorm in eval mode",
        source="GA in arXiv 2409.19732",
    )
    ascends: ClassVar[bool] = True
    retains: ClassVar[bool] = False
    # As published beside SFR-on.
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar10-resnet18": {"rule": "momentum", "lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4, "epochs": 9},
    }

    lr: float = 1e-4
    max_norm: float | None = 0.1
    freeze_batch_norm: bool = True

    def forget_loss(self, losses: Tensor, iteration: int) -> ForgetLoss:
        return self.ascent(losses, iteration)
