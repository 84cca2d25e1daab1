"""Small models and data for tests of the unlearner."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class ConvNet(nn.Module):
    """Convolution, batch normalisation and a head: weights of several shapes, and buffers."""

    def __init__(self, classes: int = 4, dropout: float = 0.0):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean(dim=(2, 3))
        return self.head(self.dropout(x))


class WithUnused(ConvNet):
    """One parameter never takes part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(5))


def make(model: type[nn.Module] = ConvNet, seed: int = 0, **arguments: object) -> nn.Module:
    torch.manual_seed(seed)
    return model(**arguments)


def samples(count: int, seed: int, classes: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 2, 5, 5, generator=generator)
    return images, torch.randint(0, classes, (count,), generator=generator)


def batches(count: int, size: int, seed: int, dtype: torch.dtype = torch.float32) -> list[Batch]:
    images, labels = samples(count * size, seed)
    return list(zip(images.to(dtype).split(size), labels.split(size), strict=True))
