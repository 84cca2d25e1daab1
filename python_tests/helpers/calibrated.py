"""Short calibrated runs on a small classifier, as several test files make them."""

from __future__ import annotations

from helpers.models import batches, make
from torch import nn

from unlearn_ext import Unlearner
from unlearn_ext.tasks import Classification

SHORT = {"forget_alpha": "auto", "iterations": 6, "lr": 0.02, "calibrate_every": 2, "calibration_samples": 16}


def sets() -> dict[str, list]:
    return {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2), "unseen": batches(4, 6, seed=6)}


def run(method, data: dict | None = None, model: nn.Module | None = None, ema: float | None = None, **arguments):
    model = make() if model is None else model
    return model, Unlearner(model, Classification(), method, ema_decay=ema).run(**(data or sets()), **arguments)
