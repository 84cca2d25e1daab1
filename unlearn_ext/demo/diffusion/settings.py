"""Settings of the diffusion demos."""

from __future__ import annotations

from typing import Any

from ...methods import SFRon

__all__ = ["BATCH_SIZE", "method_for", "task_settings"]

BATCH_SIZE = 64

# Ascent has no end: the strength that makes one digit unknown leaves another as it was and turns a third into a black
# picture. Towards what is shown for another digit there is an end, and the forgotten label's pictures stay diverse.
# Moments of its own for forgetting (DualOptim, arXiv 2504.15827) keep the retain steps undisturbed.
_COMMON: dict[str, Any] = {
    "rule": "adam",
    "iterations": 50,
    "lr": 1e-4,
    "lr_schedule": "cosine",
    "forget_term": "replace",
    "forget_alpha": 1.0,
    "forget_schedule": "constant",
    "dual_state": True,
    "max_norm": 1.0,
    "fisher_batches": 8,
}
_METHODS: dict[str, dict[str, Any]] = {
    "ddpm": {"forget_lr": 1e-3, "gamma": 5.0},
    "dit": {"lr": 2e-4, "forget_lr": 2e-3, "gamma": 5.0},
    "text": {"forget_lr": 5e-4, "gamma": 3.0},
}
_TASKS: dict[str, dict[str, Any]] = {"ddpm": {}, "dit": {}, "text": {}}


def method_for(task: str, **changes: Any) -> SFRon:
    """SFR-on with a replacement; the settings were chosen on seed 101, mostly on digit 3."""
    return SFRon(**{**_COMMON, **_METHODS[task], **changes})


def task_settings(task: str) -> dict[str, Any]:
    return dict(_TASKS[task])
