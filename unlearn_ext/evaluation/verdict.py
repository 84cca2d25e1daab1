"""What a model still knows of each part of the data, and how far that is from a retrained one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..utils.arguments import describe
from .membership import entropy_mia
from .metrics import accuracy, average_gap, js_divergence, kl_divergence, named_accuracy

__all__ = ["RETAINED_GAP_KEYS", "Parts", "distance", "knowledge"]

# A class scenario's gap is over retained classes; where a random subset is forgotten, TA_retained is TA.
RETAINED_GAP_KEYS = ("FA", "RA", "TA_retained", "MIA_entropy")


@dataclass(frozen=True)
class Parts:
    """One tensor for each part of the data: a model's logits ``[N, K]``, or the labels ``[N]``."""

    forget: Tensor
    retain: Tensor
    test: Tensor


def knowledge(logits: Parts, labels: Parts, kept: Tensor) -> dict[str, float]:
    """FA, UA = 1 − FA, RA, TA, TA_retained and MIA_entropy, as fractions.

    Args:
        logits: of the model, on the forgotten and retained training samples and on the test set.
        labels: of the same samples.
        kept: bool ``[N_t]``, the test samples of retained classes. TA_retained and the attack's non-members are
            those: a retrained model gives a forgotten class no chance, so its test samples tell nothing of membership.

    Raises:
        InputError: a part is empty or does not fit its labels, its logits are not finite, or no test sample is kept.
    """
    for name, parts in (("logits", logits), ("labels", labels)):
        if not isinstance(parts, Parts):
            raise InputError(f"{name}: expected Parts(forget=..., retain=..., test=...), got {describe(parts)}")
    found = named_accuracy(logits.forget, labels.forget, "forget")
    known = {
        "FA": found,
        "UA": 1.0 - found,
        "RA": named_accuracy(logits.retain, labels.retain, "retain"),
        "TA": named_accuracy(logits.test, labels.test, "test"),
    }
    _check_kept(kept, len(logits.test))
    kept = kept.to(logits.test.device)
    return {
        **known,
        "TA_retained": accuracy(logits.test[kept], labels.test[kept.to(labels.test.device)]),
        "MIA_entropy": entropy_mia(logits.retain, logits.test[kept], logits.forget),
    }


def _check_kept(kept: Tensor, count: int) -> None:
    if not isinstance(kept, Tensor) or kept.dtype != torch.bool or list(kept.shape) != [count]:
        raise InputError(
            f"kept: expected a bool tensor of shape [{count}], one entry for each test sample, got {describe(kept)}"
        )
    if not bool(kept.any()):
        raise InputError("kept: no test sample is of a retained class, and nothing can be measured on none")


def distance(
    known: dict[str, float], forget_logits: Tensor, retrained: dict[str, float], retrained_forget_logits: Tensor
) -> dict[str, float]:
    """KL and JS on the forget set, in nats, and the gap: mean abs difference over FA, RA, TA_retained and MIA_entropy.

    Args:
        known: what :func:`knowledge` found of the model.
        forget_logits: the model's, on the forget set.
        retrained: what it found of the model retrained without the forget set.
        retrained_forget_logits: that model's.
    """
    return {
        "KL": kl_divergence(retrained_forget_logits, forget_logits),
        "JS": js_divergence(retrained_forget_logits, forget_logits),
        "gap": average_gap(known, retrained, keys=RETAINED_GAP_KEYS),
    }
