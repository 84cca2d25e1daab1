"""Interleaved timing: rivals take turns, so that whatever else the machine does hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

__all__ = ["interleaved", "quantile", "repeats_for"]


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """Seconds of each run, ``repeats`` times. Each repetition begins with another one: none always follows the same
    neighbour's caches. One round before the clock starts."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for run in runs.values():
        run()
    for repetition in range(repeats):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            wait()
            started = time.perf_counter()
            runs[name]()
            wait()
            seconds[name].append(time.perf_counter() - started)
        progress(repetition + 1, repeats)
    return seconds


def quantile(values: Sequence[float], q: float) -> float:
    """Linear between neighbours; the median at 0.5."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[round(100 * q) - 1]


def repeats_for(weights: int) -> int:
    """Enough for steady quantiles in a time one waits for: small updates are short, and more of them are needed."""
    return max(15, min(101, 600_000_000 // weights))
