"""A clock that waits for the device, in a process that has paid for its first steps."""

from __future__ import annotations

import functools
import time

import torch

from ..demo.network import SmallResNet
from ..demo.training import train_classifier
from ..methods import SFRon
from ..tasks import Classification
from ..unlearner import Unlearner

__all__ = ["now", "warm_up"]


def now(device: str) -> float:
    """Seconds, with all that was asked of the device done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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
