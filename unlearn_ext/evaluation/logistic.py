r"""Logistic regression on one feature, solved to the last digits whatever the feature's scale.

Of the model :math:`P(\text{member} \mid x) = \sigma(a x + b)` only the cut :math:`t = -b / a` and the side of it on
which members stand decide what is taken for a member, so those are what is computed. The objective is scikit-learn's
``LogisticRegression(class_weight="balanced")``, C = 1:

.. math:: \sum_i s_i \log(1 + e^{-y_i (a x_i + b)}) + a^2 / 2, \qquad s_i = N / (2 N_{y_i}), \; y_i = \pm 1

An iterative solver that stops at a small gradient does not get away from a = 0 where the features hardly differ. With
:math:`u_i = a (x_i - t) / 2` the conditions of the optimum, in which weights of both classes cancel, are

.. math:: \sum_i s_i \tanh u_i = 0, \qquad 2 a = \sum_i s_i (y_i - \tanh u_i) (x_i - t).

The left one has one root t for every a, and on the optimal t the right one has one root a. Both sides are monotonic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Cut", "fit_cut"]

# A steepness below which tanh u is u to the last digit, so that the cut is the balanced mean.
_FLAT = 1e-9
# Means that differ by rounding alone, in parts of the largest feature.
_NOISE = 8 * torch.finfo(torch.float64).eps
_STEPS = 300  # of a search at most; halving alone takes fewer


@dataclass(frozen=True)
class Cut:
    """What a fitted attack decides by: x is a member's where sign · (x − origin) / scale > at.

    Attributes:
        origin, scale: of the feature.
        at: t, counted in the direction of the members and in units of the scale.
        sign: 1 where members stand above the cut, -1 below, 0 where nothing tells the classes apart.
    """

    origin: float
    scale: float
    at: float
    sign: int

    def members(self, x: Tensor) -> Tensor:
        """Bool [N]; nobody where nothing tells the classes apart."""
        if not self.sign:
            return torch.zeros_like(x, dtype=torch.bool)
        return self.sign * ((x - self.origin) / self.scale) > self.at


def fit_cut(members: Tensor, others: Tensor) -> Cut:
    """The optimum for features of members and of others, float64 [n] and [m], finite and not empty."""
    both = torch.cat([members, others])
    low, high = float(both.min()), float(both.max())
    origin = low + (high - low) / 2
    scale = max(high - origin, origin - low)
    if not scale:
        return Cut(origin, 1.0, 0.0, 0)
    inside, outside = ((part - origin) / scale for part in (members, others))
    difference = float(inside.mean() - outside.mean())
    if abs(difference) <= _NOISE * max(abs(low), abs(high)) / scale:
        return Cut(origin, scale, 0.0, 0)
    sign = 1 if difference > 0 else -1
    z = sign * torch.cat([inside, outside])
    weights = torch.cat([torch.full_like(part, len(z) / (2 * len(part))) for part in (inside, outside)])
    labels = torch.cat([torch.ones_like(inside), -torch.ones_like(outside)])
    return Cut(origin, scale, _best_cut(z, labels, weights, scale), sign)


def _best_cut(z: Tensor, labels: Tensor, weights: Tensor, scale: float) -> float:
    """t for a feature in units of ``scale``, of which members have more. The penalty of a steepness w in these units is
    :math:`(w / scale)^2 / 2`."""
    cut = float((weights * z).sum() / weights.sum())  # of w = 0

    def excess(w: float) -> tuple[float, float]:
        """By how much w is more than what its own predictions pay for, and the derivative."""
        nonlocal cut
        cut = _cut_at(w, z, weights, cut)
        tanh = torch.tanh(w * (z - cut) / 2)
        gain = scale * scale * float((weights * (labels - tanh) * (z - cut)).sum()) / 2
        spread = weights * (1 - tanh * tanh)
        total = spread.sum().clamp_min(1e-300)
        mean = (spread * z).sum() / total
        slope = 1 + scale * scale * float((spread * (z - mean) ** 2).sum()) / 4
        return w - gain, slope

    most = scale * scale * float((weights * labels * (z - cut)).sum()) / 2  # what w = 0 would pay for
    if most > _FLAT:
        _root(excess, 0.0, most, start=min(most, 1.0), close=1e-15 * most)
    return cut


def _cut_at(w: float, z: Tensor, weights: Tensor, start: float) -> float:
    """t where :math:`\\sum_i s_i \\tanh(w (z_i - t) / 2) = 0`."""
    if w <= _FLAT:
        return float((weights * z).sum() / weights.sum())

    def excess(t: float) -> tuple[float, float]:
        tanh = torch.tanh(w * (z - t) / 2)
        return -float((weights * tanh).sum()), float((weights * (1 - tanh * tanh)).sum()) * w / 2

    return _root(excess, float(z.min()), float(z.max()), start, close=1e-16)


def _root(
    function: Callable[[float], tuple[float, float]], low: float, high: float, start: float, close: float
) -> float:
    """Where an increasing function, given with its derivative, is 0 between ``low`` and ``high``, to within ``close``:
    Newton's steps, and halving where they lead out of what is known."""
    x = start if low <= start <= high else (low + high) / 2
    for _ in range(_STEPS):
        value, slope = function(x)
        if value == 0.0:
            return x
        low, high = (low, x) if value > 0.0 else (x, high)
        following = x - value / slope if slope > 0.0 else low
        if not low < following < high:
            following = low + (high - low) / 2
        if following in (low, high) or abs(following - x) <= close:
            return following
        x = following
    return x
