"""A network whose running statistics tell which batches it has seen, and such batches."""

from __future__ import annotations

import torch
from torch import nn


class Normed(nn.Module):
    """What batch normalisation sees is the data, whatever the weights become."""

    def __init__(self, checkpointed: bool = False):
        super().__init__()
        self.norm, self.head, self.checkpointed = nn.BatchNorm1d(3), nn.Linear(3, 4), checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.checkpointed:  # the backward pass runs it again
            return self.head(torch.utils.checkpoint.checkpoint(self.norm, x, use_reentrant=False))
        return self.head(self.norm(x))


def around(mean: float, count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (mean + torch.randn(6, 3, generator=generator), torch.randint(4, (6,), generator=generator))
        for _ in range(count)
    ]
