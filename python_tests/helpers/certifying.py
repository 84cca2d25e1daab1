"""Real digits as certified deletion takes them, read once in a process, and the model that is certified on them."""

from __future__ import annotations

from functools import cache

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from unlearn_ext.certified import SoftmaxRegression, unit_rows

MODEL = SoftmaxRegression(features=65, classes=10, l2=0.05)


@cache
def unit_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and held-out features, then their labels: scikit-learn's 1,797 digits of 8 × 8 pixels."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=360, stratify=labels, random_state=0)
    train, test, train_labels, test_labels = map(torch.from_numpy, parts)
    return unit_rows(train), unit_rows(test), train_labels, test_labels
