"""Shuffled batches of tensors on one device, without a DataLoader's overhead."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ShuffledBatches"]


class ShuffledBatches:
    """``(images, labels)``, in a new order every time; the last batch may be smaller."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, seed: int):
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self):
        order = torch.randperm(len(self.labels), generator=self.generator)
        for indices in order.split(self.batch_size):
            yield self.images[indices], self.labels[indices]
