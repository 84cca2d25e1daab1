"""Interleaved timing: rivals take turns, so that whatever else the machine does hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

__all__ = ["interleaved", "interleaved_stages", "quantile", "repeats_for"]


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """Seconds of each run, ``repeats`` times. Each repetition begins with another one: none always follows the same
    neighbour's caches. One round before the clock starts."""
    whole = interleaved_stages({name: {"": run} for name, run in runs.items()}, repeats, device, progress)
    return {name: stages[""] for name, stages in whole.items()}


def interleaved_stages(
    runs: Mapping[str, Mapping[str, Callable[[], object]]],
    repeats: int,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, list[float]]]:
    """The same for runs of several stages, which follow each other in a turn and are timed one by one."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    names = list(runs)
    seconds: dict[str, dict[str, list[float]]] = {name: {stage: [] for stage in runs[name]} for name in names}
    for stages in runs.values():
        for run in stages.values():
            run()
    for repetition in range(repeats):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            for stage, run in runs[name].items():
                wait()
                started = time.perf_counter()
                run()
                wait()
                seconds[name][stage].append(time.perf_counter() - started)
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
