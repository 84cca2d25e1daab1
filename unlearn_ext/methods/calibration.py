r"""Calibrated forgetting: ascent of each sample's loss up to where unseen data stand, and no further.

A retrained model treats the forget set as unseen data, so unseen data tell where to stop. With
:math:`q(u)` the quantiles of the starting model's losses on unseen data, a forget batch's losses :math:`l_i` and their
ranks :math:`r_i` among its N samples, each sample has the strength

.. math::
    \alpha_i = g \, \frac{\log q((r_i + 1/2) / N) + s - \log l_i}{l_i}

by which its loss rises where it is below its target and falls where it is above: easy samples stay easy, and hard ones
become those that are got wrong. The gradient of :math:`-\frac1N \sum_i \alpha_i l_i` is that of the distances of
logarithms, so that losses of all sizes count alike. What retain steps take back, and what forgetting costs unseen data
themselves, moves the shift s: every few iterations both sets are looked at in eval mode, and s follows the mean
distance of their log quantiles at that time. Logarithms are of losses plus 1e-6, below which a float32 cross-entropy
tells nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._arguments import check_count
from ..errors import InputError

__all__ = ["AUTO", "Calibration"]

AUTO = "auto"
_GAIN = 0.1  # g
_SHIFTS = (0.0, 1.5, 3.0)  # s: at least, at the start, at most
_PULL = 0.5  # of a look on s
_FLOOR = 1e-6
_QUANTILES = 200
_DAMAGE = 2.5  # times the unseen loss of the start: beyond it forgetting has ruined more than it took away
_CLOSE = 0.1  # mean distance of log quantiles that counts as met


class Calibration:
    """Where a calibrated run stands.

    Args:
        every: iterations between two looks.
        samples: of each set that a look takes at most; the targets are made from four times as many.

    Attributes:
        shift: s.
        path: one dict for each look: ``iteration``, ``shift`` (until then), ``distance`` (Kolmogorov-Smirnov, of the
            losses of both sets), ``difference`` (mean of their log quantiles', unseen minus forget), ``unseen_loss``
            (mean), ``score`` (what the best point has least of: the distance, and the logarithm of the unseen loss's
            rise beyond 2.5 times that of the start) and ``met``.
    """

    def __init__(self, every: int, samples: int):
        check_count("calibrate_every", every)
        check_count("calibration_samples", samples)
        if samples < 16:
            raise InputError(f"calibration_samples: expected 16 or more, to tell distributions apart, got {samples}")
        self.every, self.samples = every, samples
        self.shift = _SHIFTS[1]
        self.path: list[dict[str, Any]] = []
        self._targets: Tensor | None = None
        self._mean = math.nan

    @property
    def gain(self) -> float:
        return _GAIN

    def start(self, unseen: Tensor) -> None:
        """Losses on unseen data at the weights that the run starts with."""
        if len(unseen) < 16:
            raise InputError(
                f"forget_alpha='auto' has {len(unseen)} unseen samples to learn from: pass 16 or more as unseen="
            )
        self.shift, self.path = _SHIFTS[1], []
        self._targets, self._mean = _log(unseen).sort().values, float(unseen.mean())

    def strengths(self, losses: Tensor) -> Tensor:
        """α_i of a batch."""
        losses = losses.detach()
        own = _log(losses if losses.dtype == torch.float64 else losses.float())
        ranks = own.argsort().argsort()
        targets = _quantiles(self._targets.to(own), (ranks.double() + 0.5) / len(own))
        return self.gain * (targets + self.shift - own) / own.exp()

    def look(self, iteration: int, forget: Tensor, unseen: Tensor) -> dict[str, Any]:
        """The path's next entry, from losses in eval mode after so many iterations; moves the shift."""
        at = (torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES
        of_forget, of_unseen = _log(forget).double().sort().values, _log(unseen).double().sort().values
        difference = float((_quantiles(of_unseen, at) - _quantiles(of_forget, at)).mean())
        distance, mean = _kolmogorov_smirnov(of_forget, of_unseen), float(unseen.mean())
        rise = math.log((mean + _FLOOR) / (self._mean + _FLOOR))
        damage = max(0.0, rise - math.log(_DAMAGE))
        met = distance <= self.critical(len(forget), len(unseen)) and abs(difference) <= _CLOSE and damage == 0.0
        entry = {
            "iteration": iteration,
            "shift": self.shift,
            "distance": distance,
            "difference": difference,
            "unseen_loss": mean,
            "score": distance + damage,
            "met": met,
        }
        self.path.append(entry)
        self.shift = min(max(self.shift + _PULL * difference, _SHIFTS[0]), _SHIFTS[2])
        return entry

    @staticmethod
    def critical(n: int, m: int) -> float:
        """The Kolmogorov-Smirnov distance that samples of one distribution exceed in 5 % of cases."""
        return 1.36 * math.sqrt((n + m) / (n * m))


def _log(losses: Tensor) -> Tensor:
    return (losses.clamp_min(0.0) + _FLOOR).log()


def _quantiles(ordered: Tensor, at: Tensor) -> Tensor:
    """By linear interpolation between sorted values, the first at 0 and the last at 1."""
    places = at * (len(ordered) - 1)
    low = places.floor().long()
    high = (low + 1).clamp(max=len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], (places - low).to(ordered))


def _kolmogorov_smirnov(a: Tensor, b: Tensor) -> float:
    """The largest distance of two sorted samples' distribution functions."""
    at = torch.cat([a, b])
    shares = [torch.searchsorted(own, at, right=True).double() / len(own) for own in (a, b)]
    return float((shares[0] - shares[1]).abs().max())
