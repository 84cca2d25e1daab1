"""Settings of the demos, chosen on seeds from 100 up; the README reports seeds 0 to 4."""

from __future__ import annotations

from typing import Any

from ..methods import SFRon

__all__ = ["BATCH_SIZE", "method_for"]

BATCH_SIZE = 64

_COMMON: dict[str, Any] = {
    "rule": "momentum",
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "lr_schedule": "cosine",
    "forget_alpha": 25.0,
    "forget_schedule": "cosine",
    "lambd": 0.5,
    "gamma": 1.0,
}
_SCENARIOS: dict[str, dict[str, Any]] = {
    "class": {"iterations": 60, "forget_freq": 5, "max_norm": 4.0},
    "random": {"iterations": 60, "forget_freq": 1, "max_norm": 4.0},
}


def method_for(scenario: str, update: str) -> SFRon:
    return SFRon(**_COMMON, **_SCENARIOS[scenario], update=update)
