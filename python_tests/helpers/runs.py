"""Short runs of the unlearner on a small classifier, as several test files make them."""

from __future__ import annotations

import torch
from helpers.models import batches, samples
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from unlearn_ext import Unlearner
from unlearn_ext.methods import SFRon
from unlearn_ext.tasks import Classification


def method(**changes) -> SFRon:
    settings = {"rule": "momentum", "lr": 0.02, "momentum": 0.9, "iterations": 12, "forget_freq": 2, "max_norm": 1.0}
    return SFRon(**{**settings, "lr_schedule": "cosine", **changes})


def loaders(seed: int = 3) -> dict[str, DataLoader]:
    """Shuffled loaders: one draws from the global generator, one has a generator of its own."""
    own = torch.Generator().manual_seed(seed)
    return {
        "forget": DataLoader(TensorDataset(*samples(22, 1)), batch_size=4, shuffle=True),
        "retain": DataLoader(TensorDataset(*samples(37, 2)), batch_size=4, shuffle=True, generator=own),
    }


def run(model: nn.Module, data: dict | None = None, changes: dict | None = None, **arguments):
    data = data or {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    return Unlearner(model, Classification(), method(**(changes or {}))).run(**data, **arguments)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def identical(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Growing(SFRon):
    """Its forget loss becomes 8 times larger, and overflows until its scale has come down."""

    def strength(self, iteration):
        return 1.0 if iteration == 0 else 8.0


def growing() -> Growing:
    return Growing(**method(max_norm=None, lr=1e-7).settings())


class Counting:
    """Counts its passes and tells whether anything holds on to them."""

    def __init__(self, data: list):
        self.data, self.passes = data, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.data)
