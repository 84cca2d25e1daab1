"""From each seed's numbers to means, spreads, the noise floor, and what is to be warned of."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation import RETAINED_GAP_KEYS

__all__ = ["METRICS", "WARNING_RULE", "Deviation", "deviations", "noise_floor", "ranks", "spread", "summarise"]

# All that is told of a model: fractions, nats, and seconds of the clock (RTE) and the processor (CPU), also as a share
# of the retrained model's training.
METRICS = (
    "FA",
    "UA",
    "RA",
    "TA",
    "TA_retained",
    "MIA_entropy",
    "KL",
    "JS",
    "gap",
    "RTE",
    "RTE_share",
    "CPU",
    "CPU_share",
)

_LEAST, _FLOORS = 0.01, 3.0
WARNING_RULE = (
    "under-forgetting: FA or MIA above the retrained model's, over-forgetting: FA, RA, TA or MIA below it, in at least "
    "half of the seeds by more than 1 point and more than 3 times the mean distance of two retrained models there"
)
_UNDER = ("FA", "MIA_entropy")

Runs = Sequence[dict[str, Any]]  # one for each seed


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for a single value) and the values, one for each seed.

    Where a seed has no value, because its run failed, neither has the mean: a mean over the seeds that went well would
    be a method's best side.
    """
    values = list(values)
    if not values or None in values:
        return {"mean": None, "std": None, "values": values}
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def summarise(runs: Runs) -> dict[str, Any]:
    """Every metric's spread over the seeds. The gap is each seed's own, against its own retrained model."""
    return {metric: spread([run["metrics"].get(metric) for run in runs]) for metric in METRICS}


def noise_floor(retrained: Runs, again: Runs) -> dict[str, Any]:
    """The gap between two retrained models, and in ``metrics`` their distance in each metric of the gap."""
    metrics = {
        metric: spread(
            [abs(b["metrics"][metric] - a["metrics"][metric]) for a, b in zip(retrained, again, strict=True)]
        )
        for metric in RETAINED_GAP_KEYS
    }
    return {**spread([run["metrics"]["gap"] for run in again]), "metrics": metrics}


@dataclass(frozen=True)
class Deviation:
    """A metric that stands off the retrained model's by more than :data:`WARNING_RULE` allows.

    Attributes:
        kind: ``over`` or ``under``: forgetting.
        metric: of the gap.
        mean: signed difference to the retrained model, over the seeds.
        seeds: how many of them are off.
        tolerance: beyond which one is.
    """

    kind: str
    metric: str
    mean: float
    seeds: int
    tolerance: float


def deviations(runs: Runs, retrained: Runs, floor: dict[str, Any]) -> list[Deviation]:
    """What is to be warned of, by :data:`WARNING_RULE`. Runs that failed have none."""
    marks = []
    if any("failed" in run for run in runs):
        return marks
    for metric in RETAINED_GAP_KEYS:
        tolerance = max(_LEAST, _FLOORS * floor["metrics"][metric]["mean"])
        signed = [a["metrics"][metric] - b["metrics"][metric] for a, b in zip(runs, retrained, strict=True)]
        for kind, sign in (("under", 1.0), ("over", -1.0)):
            seeds = sum(sign * difference > tolerance for difference in signed)
            if 2 * seeds >= len(signed) and (kind == "over" or metric in _UNDER):
                marks.append(Deviation(kind, metric, statistics.fmean(signed), seeds, tolerance))
    return marks


def ranks(values: dict[str, float | None]) -> dict[str, int | None]:
    """1 for the smallest; equal values share a rank; None has none."""
    present = sorted(value for value in values.values() if value is not None)
    return {name: None if value is None else 1 + present.index(value) for name, value in values.items()}
