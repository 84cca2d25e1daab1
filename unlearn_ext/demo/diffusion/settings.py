"""Settings of the diffusion demos."""

from __future__ import annotations

from typing import Any

from ...methods import SFRon

__all__ = ["BATCH_SIZE", "method_for"]

BATCH_SIZE = 64

# Ascent has no end: the strength that makes one digit unknown leaves another as it was and turns a third into a black
# picture. Towards what is shown for another digit there is an end, the same for every digit. It is one other digit:
# the mean over all others is close to what the network shows without a label, and that is the forgotten digit at times.
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
# The Fisher pass over the forget batches sees the stand-ins as well: its ratio marks weights that decide what the label
# shows, and is larger than that of the forgotten pictures alone; hence the high gammas.
# No retained sample reads the forgotten label's row of the embedding table: its retain Fisher is 0, and a step there
# costs the others nothing. Most of the way is made in it, by steps that suit the table's size (entries of about 1 in
# the UNet, 0.1 in the DiT).
_METHODS: dict[str, dict[str, Any]] = {
    "ddpm": {"forget_lr": 2.5e-4, "gamma": 20.0, "param_groups": {"class_embedding.*": {"forget_lr": 0.2}}},
    "dit": {"lr": 2e-4, "forget_lr": 5e-4, "gamma": 20.0, "param_groups": {"*.class_embedder.*": {"forget_lr": 0.03}}},
    "text": {"lr": 2e-4, "forget_lr": 2e-3, "gamma": 50.0},
}


def method_for(task: str, **changes: Any) -> SFRon:
    """SFR-on with a replacement; the settings were chosen on seeds 101 to 104."""
    return SFRon(**{**_COMMON, **_METHODS[task], **changes})
