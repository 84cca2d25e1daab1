"""Which samples of a seed are forgotten, retained, held out and tested on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.shuffled import ShuffledBatches
from ..evaluation import Parts

__all__ = ["Samples", "Split"]


@dataclass(frozen=True)
class Samples:
    """Images, labels, and where they stand in the whole data set."""

    images: Tensor
    labels: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> Samples:
        return Samples(self.images[chosen], self.labels[chosen], self.indices[chosen])

    def to(self, device: torch.device | str) -> Samples:
        return Samples(self.images.to(device), self.labels.to(device), self.indices)

    def batches(self, batch_size: int, seed: int) -> ShuffledBatches:
        return ShuffledBatches(self.images, self.labels, batch_size, seed)


@dataclass(frozen=True)
class Split:
    """One seed's samples, in disjoint sets.

    Attributes:
        forget, retain: the training set's two parts.
        held_out: unseen by training, split off before it; never the test set. Of the classes that are not forgotten.
        test: for the evaluation alone.
        kept: bool over the test set: samples of classes that are not forgotten.
    """

    forget: Samples
    retain: Samples
    held_out: Samples
    test: Samples
    kept: Tensor

    @property
    def labels(self) -> Parts:
        return Parts(self.forget.labels, self.retain.labels, self.test.labels)
