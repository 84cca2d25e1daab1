"""Small networks trained on real digits, whole or without some."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from helpers import shared_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from unlearn_ext.data.shuffled import ShuffledBatches
from unlearn_ext.demo.network import SmallResNet
from unlearn_ext.demo.training import train_classifier


@dataclass(frozen=True)
class Digits:
    """A small network trained on 1,000 digits, or on some of them."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def batches(self, chosen: Tensor, seed: int = 17) -> ShuffledBatches:
        return ShuffledBatches(self.images[chosen], self.labels[chosen], 64, seed)

    def on(self, model: nn.Module, chosen: Tensor) -> tuple[float, float]:
        """Accuracy and mean loss on training digits."""
        return measured(model, self.images[chosen], self.labels[chosen])

    def on_test(self, model: nn.Module, *left_out: int) -> float:
        """Accuracy on test digits of the other classes."""
        chosen = ~torch.isin(self.test_labels, torch.tensor(left_out))
        return measured(model, self.test_images[chosen], self.test_labels[chosen])[0]


@torch.no_grad()
def measured(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    logits = model.eval()(images)
    return (logits.argmax(1) == labels).double().mean().item(), cross_entropy(logits, labels).item()


def trained(*left_out: int) -> Digits:
    split = shared_digits.digits().split(1000, 1000, seed=0)
    chosen = ~torch.isin(split.train_labels, torch.tensor(left_out))
    model = SmallResNet(widths=(8, 24, 48), seed=0)
    train_classifier(model, split.train_images[chosen], split.train_labels[chosen], epochs=8)
    return Digits(model, split.train_images, split.train_labels, split.test_images, split.test_labels)
