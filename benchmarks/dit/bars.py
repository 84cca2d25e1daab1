"""What the project asks of its own speed, and whether a measurement shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.dit import network
from benchmarks.dit.measure import Measured

__all__ = ["Bar", "bars", "condition"]

_OURS, _RIVALS = ("ours", "ours, in backward"), ("plain", "tuned")
_BATCHED = ("ours, per sample", "ours, compiled")


@dataclass(frozen=True)
class Bar:
    """One comparison.

    Attributes:
        what: is compared.
        ours: the better of ours, or None where none was measured.
        least: how many times as fast ours must be. For memory more than so many times ours must go into the rival's.
        times: how many times it is, or None where it was not measured.
        rival: what it is compared to.
        most: how many times as fast ours would be if forward and backward passes alone took time; None where passes
            were not timed by themselves, have no part in it, or are compiled.
    """

    what: str
    ours: str | None
    least: float
    times: float | None
    rival: str | None
    most: float | None = None

    @property
    def holds(self) -> bool | None:
        if self.times is None:
            return None
        return self.times > self.least if self.least == 1.0 else self.times >= self.least

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}

    def __str__(self) -> str:
        asked = f"{self.what} {'>' if self.least == 1.0 else '≥'} {self.least:g} ×"
        if self.times is None:
            return f"not measured: {asked}"
        limit = "" if self.most is None else f"; {self.most:.2f} × if only forward and backward took time"
        return (
            f"{'holds' if self.holds else 'missed'}: {asked}: {self.times:.2f} × "
            f"({self.ours} against {self.rival}{limit})"
        )


def bars(measured: Measured) -> list[Bar]:
    """The faster of ours against the faster rival; memory against the plain loop."""
    plain = _peak(measured, "plain")
    peaks = {name: peak for name in _OURS if (peak := _peak(measured, name))}
    least = min(peaks, key=peaks.get, default=None)
    rows = [
        _speed(measured, "iteration", _OURS, 1.2, "whole iteration"),
        _speed(measured, "iteration", _BATCHED[1:], 1.2, "whole iteration, compiled"),
        _speed(measured, "fisher", _OURS, 1.1, "Fisher"),
        _speed(measured, "fisher", _BATCHED, 1.5, "Fisher, batched or compiled"),
        _speed(measured, "mask", _OURS, 5.0, "mask"),
    ]
    if plain is None or least is None:
        return [*rows, Bar("peak memory", None, 1.0, None, None)]
    return [*rows, Bar("peak memory", least, 1.0, plain / peaks[least], "plain")]


def _peak(measured: Measured, name: str) -> int | None:
    """Over all stages."""
    return max(measured.peaks.get(name, {}).values(), default=None)


def _speed(measured: Measured, stage: str, ours: Sequence[str], least: float, what: str) -> Bar:
    own, rivals = (
        {name: value for name in names if (value := measured.median(stage, name)) is not None}
        for names in (ours, _RIVALS)
    )
    if not own or not rivals:
        return Bar(what, None, least, None, None)
    best, rival = min(own, key=own.get), min(rivals, key=rivals.get)
    passes = measured.median(stage, "passes") if ours is _OURS else None
    most = None if passes is None else rivals[rival] / passes
    return Bar(what, best, least, rivals[rival] / own[best], rival, most)


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
