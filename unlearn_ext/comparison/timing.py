"""A clock that waits for the device, in a process that has paid for its first steps.

A share of retraining's seconds divides what was taken at two times: the unlearning's when it ran, and retraining's when
that model was trained, perhaps by an earlier comparison whose models are used again.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..demo.network import SmallResNet
from ..demo.training import train_classifier
from ..methods import SFRon
from ..run.unlearner import Unlearner
from ..tasks import Classification

__all__ = ["Seconds", "stopwatch", "warm_up"]


@dataclass
class Seconds:
    """Of the clock, and of the processor's work for this process, which others on the machine disturb less."""

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
    found = Seconds()
    _wait(device)
    clock, cpu = time.perf_counter(), time.process_time()
    yield found
    _wait(device)
    found.clock, found.cpu = time.perf_counter() - clock, time.process_time() - cpu


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def warm_up(batch_size: int, device: str) -> None:
    """One step of training and of unlearning on noise.

    The first of a process loads libraries and modules and takes seconds, and whichever model or method came first
    would pay for them.
    """
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(2 * batch_size, 1, 28, 28, generator=generator), torch.arange(2 * batch_size) % 10
    with torch.random.fork_rng():
        model = train_classifier(SmallResNet(seed=0), images, labels, epochs=1, batch_size=batch_size, device=device)
        forget, retain = ([(images[part], labels[part])] for part in (slice(batch_size), slice(batch_size, None)))
        method = SFRon(iterations=1, gamma=None)
        Unlearner(model, Classification(), method).run(forget, retain, allow_duplicates=True)
