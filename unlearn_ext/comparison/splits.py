"""Which digits are forgotten, retained, held out and tested on: disjoint, and drawn from the seed alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import Digits
from ..data.digits import CLASSES
from ..demo.batches import ShuffledBatches
from ..evaluation import Parts
from .protocol import Protocol

__all__ = ["Samples", "Split", "split_digits"]


@dataclass(frozen=True)
class Samples:
    """Images, labels, and where they stand among all digits."""

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
    """One seed's digits.

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


def split_digits(digits: Digits, protocol: Protocol, seed: int) -> Split:
    """Each set has the classes in equal parts, to within one sample; the random forget set is drawn over all classes.

    The test set depends on its size and the seed alone, whatever the other sizes.
    """
    drawn = digits.split(protocol.train_size + protocol.held_out_size, protocol.test_size, seed=seed)
    pool = Samples(drawn.train_images, drawn.train_labels, drawn.train_indices)
    in_training = torch.zeros(len(pool), dtype=torch.bool, device="cpu")
    for digit in range(CLASSES):
        # The same classes get the left-over samples as in the pool, so that every quota can be met.
        quota = protocol.train_size // CLASSES + (digit >= CLASSES - protocol.train_size % CLASSES)
        in_training[(pool.labels == digit).nonzero().squeeze(1)[:quota]] = True
    train, held_out = pool[in_training], pool[~in_training]
    test = Samples(drawn.test_images, drawn.test_labels, drawn.test_indices)
    forgotten = _forgotten(train.labels, protocol, seed)
    kept = torch.ones(len(test), dtype=torch.bool, device="cpu")
    if protocol.scenario == "class":
        kept = test.labels != protocol.forget_class
        held_out = held_out[held_out.labels != protocol.forget_class]
    return Split(train[forgotten], train[~forgotten], held_out, test, kept)


def _forgotten(labels: Tensor, protocol: Protocol, seed: int) -> Tensor:
    """Bool over the training set; another random subset for each seed."""
    if protocol.scenario == "class":
        return labels == protocol.forget_class
    chosen = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed), device="cpu")
    chosen[order[: protocol.forget_size]] = True
    return chosen
