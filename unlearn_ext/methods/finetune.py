"""Fine-tuning on what is kept: forgetting by neglect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..errors import InputError
from .base import Method
from .row import Row
from .values import ForgetLoss

__all__ = ["Finetune"]


@dataclass(kw_only=True)
class Finetune(Method):
    """Descent on the retain set alone; the forget set is only looked at, for samples that stand in both."""

    name: ClassVar[str] = "finetune"
    row: ClassVar[Row] = Row(
        saliency="every weight",
        forget_term="none",
        retain_term="mean loss",
        geometry="retain steps alone",
        source="FT in arXiv 2409.19732",
    )
    forgets: ClassVar[bool] = False
    # As published beside SFR-on; momentum and decay are those of training.
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar10-resnet18": {"rule": "momentum", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "epochs": 10},
    }

    def strength(self, iteration: int) -> float:
        return 0.0

    def forget_loss(self, losses: Tensor, iteration: int) -> ForgetLoss:
        raise InputError("finetune has no forget term")
