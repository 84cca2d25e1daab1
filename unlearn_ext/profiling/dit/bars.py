"""What the project asks of its own speed, and whether a measurement shows it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from . import network
from .measure import Measured

__all__ = ["Bar", "bars", "condition"]

_RIVALS = ("plain", "tuned")


@dataclass(frozen=True)
class Bar:
    """One comparison.

    Attributes:
        what: is compared, ours by name included.
        least: how many times as fast ours must be; for memory, how many times ours must go into the rival's.
        found: how many times it is, or None where it was not measured.
        rival: the faster one, which it is compared to.
    """

    what: str
    least: float
    found: float | None
    rival: str | None

    @property
    def holds(self) -> bool | None:
        if self.found is None:
            return None
        return self.found > 1.0 if self.least == 1.0 else self.found >= self.least

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}

    def __str__(self) -> str:
        sign = ">" if self.least == 1.0 else "≥"
        asked = f"{self.what} {sign} {self.least:g} ×"
        if self.found is None:
            return f"not measured: {asked}"
        return f"{'holds' if self.holds else 'missed'}: {asked}: {self.found:.2f} × against {self.rival}"


def bars(measured: Measured) -> list[Bar]:
    """Against the faster rival; memory against the plain loop."""
    exact = [name for name in ("ours, per sample", "ours, compiled") if measured.median("fisher", name)]
    best = min(exact, key=lambda name: measured.median("fisher", name), default="ours, per sample or compiled")
    found = [
        _speed(measured, "iteration", "ours", 1.2, "whole iteration"),
        _speed(measured, "fisher", "ours", 1.1, "Fisher"),
        _speed(measured, "fisher", best, 1.5, f"Fisher, {best.removeprefix('ours, ')}"),
        _speed(measured, "mask", "ours", 5.0, "mask"),
    ]
    own, plain = (max(measured.peaks.get(name, {}).values(), default=0) for name in ("ours", "plain"))
    ratio = plain / own if own and plain else None
    return [*found, Bar("peak memory below the plain loop's", 1.0, ratio, "plain" if ratio else None)]


def _speed(measured: Measured, stage: str, ours: str, least: float, what: str) -> Bar:
    own = measured.median(stage, ours)
    seconds = {name: value for name in _RIVALS if (value := measured.median(stage, name)) is not None}
    if own is None or not seconds:
        return Bar(what, least, None, None)
    rival = min(seconds, key=seconds.get)
    return Bar(what, least, seconds[rival] / own, rival)


def condition(measured: Measured, threads: int) -> str | None:
    """Why the bars were not made for this run, or None where they were."""
    settings, others = measured.settings, []
    if settings.device.type != "cpu":
        others.append(str(settings.device))
    elif threads != 2:
        others.append(f"{threads} thread{'s' if threads > 1 else ''}")
    if settings.shape != network.NETWORKS["dit-s-2"]:
        others.append("another network")
    if settings.batch_size != 1:
        others.append(f"batches of {settings.batch_size}")
    if settings.dtype != "float32":
        others.append(settings.dtype)
    if settings.checkpointing:
        others.append("gradient checkpointing")
    return (
        f"The bars are for DiT-S/2 with batches of 1 on two CPU cores; this is {', '.join(others)}." if others else None
    )
