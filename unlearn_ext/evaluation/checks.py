"""What the measures refuse: each a sentence that names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError
from ..utils.arguments import describe, is_dense

__all__ = ["checked_features", "checked_labels", "checked_logits", "checked_value"]


def checked_logits(logits: Tensor, name: str) -> Tensor:
    """``logits`` as float64 on the CPU, refused unless it is a finite, non-empty ``[N, K]`` with K ≥ 2."""
    if not is_dense(logits) or logits.dim() != 2 or not logits.is_floating_point():
        raise InputError(
            f"{name}: expected a floating-point tensor of shape [samples, classes], got {describe(logits)}"
        )
    if logits.shape[0] == 0 or logits.shape[1] < 2:
        raise InputError(f"{name}: expected at least one sample and two classes, got shape {list(logits.shape)}")
    logits = logits.detach().to("cpu").to(torch.float64)  # two moves: some devices have no float64
    finite = torch.isfinite(logits).all(dim=1)
    if not finite.all():
        bad = int((~finite).nonzero()[0, 0])
        raise InputError(
            f"{name}: expected finite values, got {int((~finite).sum())} rows with inf or NaN, the first at index {bad}"
        )
    return logits


def checked_labels(labels: Tensor, name: str, count: int, classes: int, what: str) -> Tensor:
    """``labels`` as int64 on the CPU, refused unless they are ``count`` class indices, one for each of ``what``."""
    if not is_dense(labels) or labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
        raise InputError(f"{name}: expected a 1-d tensor of integer class indices, got {describe(labels)}")
    labels = labels.detach().to("cpu", torch.int64)
    if len(labels) != count:
        raise InputError(f"{name}: expected {count} entries, one for each {what}, got {len(labels)}")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= classes:
        raise InputError(f"{name}: expected values in [0, {classes}), got values from {lowest} to {highest}")
    return labels


def checked_features(features: Tensor, name: str, least: int = 1, flat: bool = True) -> Tensor:
    """``features`` as float64 on the CPU, refused unless it is a finite ``[N, features]``, or with ``flat=False``
    ``[N, ...]``, of ``least`` samples or more."""
    fits = is_dense(features) and not features.is_complex()
    if not fits or (features.dim() != 2 if flat else features.dim() < 2):
        raise InputError(
            f"{name}: expected a tensor of shape [N, {'features' if flat else '...'}], got {describe(features)}"
        )
    if len(features) < least or not features[0].numel():
        samples = "1 sample" if least == 1 else f"{least} samples"
        raise InputError(f"{name}: expected at least {samples} of one number or more, got shape {list(features.shape)}")
    features = features.detach().to("cpu").to(torch.float64)
    if not bool(torch.isfinite(features).all()):
        raise InputError(f"{name}: not all features are finite, which no distance can be measured with")
    return features


def checked_value(metrics: Mapping[str, float], name: str, key: str) -> float:
    """The metric, refused unless it is a finite number."""
    if not isinstance(metrics, Mapping):
        raise InputError(f"{name}: expected a dict of metrics, got {describe(metrics)}")
    if key not in metrics:
        raise InputError(f"{name}: expected the metric {key!r}, got {sorted(map(str, metrics))}")
    value = metrics[key]
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # text; a tensor of several numbers
        raise InputError(f"{name}: expected {key!r} to be a finite number, got {describe(value)}") from None
    if isinstance(value, str) or not math.isfinite(number):
        raise InputError(f"{name}: expected {key!r} to be a finite number, got {value!r}")
    return number
