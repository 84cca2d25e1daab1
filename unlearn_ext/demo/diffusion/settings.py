"""Settings of the diffusion demos."""

from __future__ import annotations

from typing import Any

from ...methods import SFRon

__all__ = ["BATCH_SIZE", "method_for", "task_settings"]

BATCH_SIZE = 64

_COMMON = {"rule": "adam", "iterations": 50, "forget_schedule": "cosine", "gamma": 1.0, "max_norm": 1.0}
_METHODS: dict[str, dict[str, Any]] = {
    "ddpm": {"lr": 5e-4, "forget_alpha": 10.0, "lambd": 0.5, "adaptive_eps": 1e-8},
    "dit": {"lr": 5e-4, "forget_alpha": 10.0, "lambd": 0.5, "adaptive_eps": 1e-8},
    "text": {"lr": 5e-4, "forget_alpha": 1.0, "forget_term": "replace", "forget_schedule": "constant"},
}
_TASKS: dict[str, dict[str, Any]] = {"ddpm": {}, "dit": {}, "text": {}}


def method_for(task: str, **changes: Any) -> SFRon:
    """The method's settings, chosen on seeds from 100 up."""
    return SFRon(**{**_COMMON, **_METHODS[task], **changes})


def task_settings(task: str) -> dict[str, Any]:
    return dict(_TASKS[task])
