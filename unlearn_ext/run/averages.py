"""Exponential moving averages of the trained weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..distributed.shards import local

__all__ = ["Averages"]


class Averages:
    """ema = decay · ema + (1 − decay) · weight after every iteration, from the weights that the run starts with.

    In float32 (float64 for float64 weights): the share 1 − decay of a step is lost in half precision.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], decay: float):
        self.named, self.decay = named, decay
        self.tensors = {
            name: p.detach().to(torch.float64 if p.dtype == torch.float64 else torch.float32, copy=True)
            for name, p in named
        }

    @torch.no_grad()
    def update(self) -> None:
        for name, p in self.named:
            average = local(self.tensors[name])
            moved = local(p).detach().to(average.dtype, copy=True)
            same = average == moved
            torch.lerp(average, moved, 1.0 - self.decay, out=moved)
            # What has not moved keeps its bits: a + s (w - a) makes 0 of -0, and NaN of infinity.
            torch.where(same, average, moved, out=average)
