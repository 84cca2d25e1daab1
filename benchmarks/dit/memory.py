"""The most memory that each stage of a way holds, on the device, with everything that lives on from earlier stages."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.dit.ways import SIDES, Way
from unlearn_ext.jobs.trial import _LiveBytes

__all__ = ["COUNTED", "peaks"]

COUNTED = {
    "cpu": "tensors that PyTorch's operators take or return; what one allocates within itself is not seen",
    "cuda": "what PyTorch's allocator has handed out",
}


def peaks(way: Way, batches: Sequence[Any]) -> dict[str, int]:
    """Bytes by stage, weights included, of a run of its own from the first Fisher batch to the second iteration.

    The way must be the only one that holds anything on the device.
    """
    found: dict[str, int] = {}

    def stages(lap: Callable[[], int]) -> None:
        def note(name: str) -> None:
            found[name] = max(found.get(name, 0), lap())

        way.start_fisher()
        for side in SIDES:
            way.fisher(side, batches)
        note("fisher")
        way.mask()
        note("mask")
        way.end_fisher()
        way.start_steps()
        for _ in range(2):  # the first makes the optimizer's moments
            lap()
            way.forget_step()
            note("forget")
            way.retain_step()
            note("retain")

    if way.bench.device.type == "cuda":
        gc.collect()
        _allocated(way.bench.device)
        stages(lambda: _allocated(way.bench.device))
    else:
        with _LiveBytes(way.bench.device, ()) as live:
            stages(live.lap)
    return found


def _allocated(device: torch.device) -> int:
    """The peak since the last call."""
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
