r"""Calibrated forgetting: ascent of each sample's loss up to where it should stand, and no further.

**Unseen losses.** A retrained model treats the forget set as unseen data, so unseen data tell where to stop. With
:math:`q(u)` the quantiles of the starting model's losses on unseen data, a forget batch's losses :math:`l_i` and their
ranks :math:`r_i` among its N samples, each sample has the strength

.. math::
    \alpha_i = g \, \frac{\log q((r_i + 1/2) / N) + s - \log l_i}{l_i}

by which its loss rises where it is below its target and falls where it is above: easy samples stay easy, and hard ones
become those that are got wrong. The gradient of :math:`-\frac1N \sum_i \alpha_i l_i` is g times that of half the mean
squared distance of logarithms, so that losses of all sizes count alike. What retain steps take back, and what
forgetting costs unseen data themselves, moves the shift s, which starts at 2: every few iterations the same samples of
both sets are looked at in eval mode, and each look adds the mean distance of their log quantiles to s, within 0 and 4.
Logarithms are of losses plus 1e-6, below which a float32 cross-entropy tells nothing.

**Target accuracy.** For a class there are no unseen data that the wanted model would treat alike, but an accuracy can
be asked for, such as 0. Of a batch, the samples of rank :math:`r_i + 1/2 \ge a N` for a target accuracy a are to be
got wrong, those of the smallest losses may stay right. Among C classes no sample of a loss above :math:`\log C` is got
right, so these have the strength

.. math::
    \alpha_i = g \, \frac{\max(0, \log \log C + s - \log l_i)}{l_i}

and the others 0. To s, which starts at 2, each look adds three times what the accuracy in eval mode is above a, within
0 and 5. Unseen data, here of the classes that stay, tell the damage: the accuracy that is lost on them.

**Looks** cost a forward pass of both sets' samples each; that at the start moves no shift. Unless their spacing is
given it is such that all of them, that at the start included, cost at most a fifth of the training passes, one forward
and backward being counted as two forward; there are two at least, at the start and at the end.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from ..utils.arguments import check_count, check_number

__all__ = ["AUTO", "LEAST_SAMPLES", "Calibration", "TargetAccuracy", "UnseenLosses", "spacing"]

AUTO = "auto"
LEAST_SAMPLES = 16  # that tell distributions apart
_GAIN = 0.1  # g
_SHIFTS = (0.0, 2.0, 4.0)  # s: at least, at the start, at most
_PULL = 1.0  # of a look on s
_COST = 0.2  # of looks, as a part of the training's
_FLOOR = 1e-6
_QUANTILES = 200
_RUIN = 2.5  # times the unseen loss of the start: beyond it forgetting has ruined more than it took away
_HARMLESS = 0.02  # damage with which a run may end before its last iteration
_CLOSE = 0.1  # mean distance of log quantiles that counts as met
# The same of a target accuracy.
_ACCURACY_SHIFTS = (0.0, 2.0, 5.0)
_ACCURACY_PULL = 3.0
_ACCURACY_CLOSE = 0.01  # of the target, and to the start's on unseen data


class Calibration(ABC):
    """Where a calibrated run stands.

    Args:
        every: iterations between two looks; None: :func:`spacing`.
        samples: of each set that a look counts at most; batches are taken whole.

    Attributes:
        shift: s.
        path: one dict for each look: ``iteration``, ``shift`` (until then), what was measured, ``score`` (what the best
            point has least of, after those that met the target: the distance to what is wanted, and the damage to
            unseen data) and ``met``.
    """

    takes_hits: ClassVar[bool] = False  # whether looks take 1 for each sample that is got right, else 0; else losses
    shifts: ClassVar[tuple[float, float, float]] = _SHIFTS  # at least, at the start, at most
    pull: ClassVar[float] = _PULL

    def __init__(self, every: int | None, samples: int):
        if every is not None:
            every = check_count("calibrate_every", every)
        samples = check_count("calibration_samples", samples)
        if samples < LEAST_SAMPLES:
            raise InputError(
                f"calibration_samples: expected {LEAST_SAMPLES} or more, to tell distributions apart, got {samples}"
            )
        self.every, self.samples = every, samples
        self.shift = self.shifts[1]
        self.path: list[dict[str, Any]] = []
        self._mean = math.nan  # of the unseen data at the start

    @property
    def gain(self) -> float:
        return _GAIN

    def start(self, unseen: Tensor, wrong_loss: float | None = None) -> None:
        """Losses (or hits) on unseen data at the weights that the run starts with, and, where looks take hits, the loss
        above which no sample is got right."""
        if len(unseen) < LEAST_SAMPLES:
            raise InputError(
                f"forget_alpha='auto' has {len(unseen)} unseen samples to learn from: pass {LEAST_SAMPLES} or more as "
                "unseen="
            )
        self.shift, self.path = self.shifts[1], []
        self._mean = float(unseen.mean())

    def strengths(self, losses: Tensor) -> Tensor:
        """α_i of a batch."""
        losses = losses.detach()
        own = _log(losses if losses.dtype == torch.float64 else losses.float())
        return self.gain * self._distances(own) / own.exp()

    @abstractmethod
    def _distances(self, own: Tensor) -> Tensor:
        """How far the logarithms of a batch's losses are to go."""

    def look(self, iteration: int, forget: Tensor, unseen: Tensor) -> dict[str, Any]:
        """The path's next entry, from losses (or hits) in eval mode after so many iterations; moves the shift."""
        measured, score, met, off = self._compare(forget, unseen)
        met &= iteration > 0  # a starting model that looks as if it had forgotten has not
        entry = {"iteration": iteration, "shift": self.shift, **measured, "score": score, "met": met}
        self.path.append(entry)
        if iteration > 0:  # before the first step there is nothing that retain steps could have taken back
            self.shift = min(max(self.shift + self.pull * off, self.shifts[0]), self.shifts[2])
        return entry

    @abstractmethod
    def _compare(self, forget: Tensor, unseen: Tensor) -> tuple[dict[str, Any], float, bool, float]:
        """What was measured, the score, whether it is met, and what pulls s."""

    @staticmethod
    def order(entry: dict[str, Any]) -> tuple[bool, float]:
        """By which a look is better than another: the smaller; what is met before what is not."""
        return not entry["met"], entry["score"]


class UnseenLosses(Calibration):
    """The forget set's losses brought to those of unseen data.

    A look measures ``distance`` (Kolmogorov-Smirnov, of the losses of both sets), ``difference`` (mean of their log
    quantiles', unseen minus forget), ``unseen_loss`` (mean) and ``unseen_sure``: the part of the unseen samples of a
    loss below log 2, to which a classifier gives a probability above 1/2, and which it so gets right. The damage is
    what that part has lost since the start, and the logarithm of the unseen loss's rise beyond 2.5 times that of the
    start, which tells of ruin where losses are no cross-entropies.
    """

    _targets: Tensor
    _sure: float

    def start(self, unseen: Tensor, wrong_loss: float | None = None) -> None:
        super().start(unseen)
        self._targets = _log(unseen).sort().values
        self._sure = _sure(unseen)

    def _distances(self, own: Tensor) -> Tensor:
        targets = _quantiles(self._targets.to(own), (_ranks(own).double() + 0.5) / len(own))
        return targets + self.shift - own

    def _compare(self, forget: Tensor, unseen: Tensor) -> tuple[dict[str, Any], float, bool, float]:
        at = (torch.arange(_QUANTILES, dtype=torch.float64, device="cpu") + 0.5) / _QUANTILES
        of_forget, of_unseen = _log(forget).double().sort().values, _log(unseen).double().sort().values
        difference = float((_quantiles(of_unseen, at) - _quantiles(of_forget, at)).mean())
        distance = _kolmogorov_smirnov(of_forget, of_unseen)
        mean, sure = float(unseen.mean()), _sure(unseen)
        ruin = max(0.0, math.log((mean + _FLOOR) / (self._mean + _FLOOR)) - math.log(_RUIN))
        damage = max(0.0, self._sure - sure) + ruin
        alike = distance <= self.critical(len(forget), len(unseen)) and abs(difference) <= _CLOSE
        measured = {"distance": distance, "difference": difference, "unseen_loss": mean, "unseen_sure": sure}
        return measured, distance + damage, alike and damage <= _HARMLESS + 1e-12, difference

    @staticmethod
    def critical(n: int, m: int) -> float:
        """The Kolmogorov-Smirnov distance that samples of one distribution exceed in 5 % of cases."""
        return 1.36 * math.sqrt((n + m) / (n * m))


class TargetAccuracy(Calibration):
    """The forget set's accuracy brought to a target, from above.

    A look measures ``accuracy`` and ``unseen_accuracy``. The damage is what the latter has lost since the start.

    Args:
        target: from 0 to 1.
    """

    takes_hits: ClassVar[bool] = True
    shifts: ClassVar[tuple[float, float, float]] = _ACCURACY_SHIFTS
    pull: ClassVar[float] = _ACCURACY_PULL

    _wrong: float

    def __init__(self, every: int | None, samples: int, target: float):
        super().__init__(every, samples)
        expected = "a number from 0 to 1, or None"
        self.target = check_number("target_accuracy", target, expected, lambda x: 0.0 <= x <= 1.0)

    def start(self, unseen: Tensor, wrong_loss: float | None = None) -> None:
        super().start(unseen)
        self._wrong = math.log(wrong_loss)

    def _distances(self, own: Tensor) -> Tensor:
        wrong = _ranks(own) + 0.5 >= self.target * len(own)
        return wrong * (self._wrong + self.shift - own).clamp_min(0.0)

    def _compare(self, forget: Tensor, unseen: Tensor) -> tuple[dict[str, Any], float, bool, float]:
        accuracy, kept = float(forget.double().mean()), float(unseen.double().mean())
        off, damage = accuracy - self.target, max(0.0, self._mean - kept)
        # No closer than one sample more or less allows.
        close, harmless = (max(_ACCURACY_CLOSE, x) + 1e-12 for x in (0.5 / len(forget), 1.0 / len(unseen)))
        met = abs(off) <= close and damage <= harmless
        return {"accuracy": accuracy, "unseen_accuracy": kept}, abs(off) + damage, met, off


def spacing(iterations: int, trained: float, looked: int) -> int:
    """Iterations between two looks at ``looked`` samples, in a run that trains on ``trained``, samples that are taken
    twice counted twice."""
    looks = int(_COST * 2 * trained / looked + 1e-9) - 1  # after that at the start
    return math.ceil(iterations / max(1, looks))


def _sure(losses: Tensor) -> float:
    return float((losses < math.log(2.0)).double().mean())


def _ranks(losses: Tensor) -> Tensor:
    return losses.argsort().argsort()


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
