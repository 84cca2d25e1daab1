"""A clock that waits for the device.

A share of retraining's seconds divides what was taken at two times: the unlearning's when it ran, and retraining's when
that model was trained, perhaps by an earlier comparison whose models are used again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

__all__ = ["Seconds", "stopwatch"]


@dataclass
class Seconds:
    """Seconds of the clock, and of the processor's work for this process, which others on the machine disturb less."""

    clock: float = 0.0
    cpu: float = 0.0

    def metrics(self, retraining: Seconds) -> dict[str, float]:
        """RTE and CPU, and what share of retraining's they are, which were taken when that model was trained."""
        return {
            "RTE": self.clock,
            "RTE_share": self.clock / retraining.clock,
            "CPU": self.cpu,
            "CPU_share": self.cpu / retraining.cpu,
        }


@contextlib.contextmanager
def stopwatch(device: str) -> Iterator[Seconds]:
    """Yields what is filled in when the block has ended and all that it asked of the device is done."""
    seconds = Seconds()
    _wait(device)
    clock, cpu = time.perf_counter(), time.process_time()
    yield seconds
    _wait(device)
    seconds.clock, seconds.cpu = time.perf_counter() - clock, time.process_time() - cpu


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
