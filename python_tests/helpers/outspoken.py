"""A run whose result says the same as its warnings."""

from __future__ import annotations

import warnings

import torch
from helpers.models import batches, make
from torch import Tensor, nn

from unlearn_ext import Unlearner, UnlearningWarning
from unlearn_ext.run.signs import KEYS
from unlearn_ext.tasks import Classification, Task

__all__ = ["DATA", "QUIET", "Vector", "cluster_batches", "clusters", "go", "normed", "trained"]

DATA = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
QUIET = "sfron:gamma=none,lr=1e-3,iterations=3"


def go(method, data: dict | None = None, model: nn.Module | None = None, task: Task | None = None, **arguments):
    """A run's result, after its sentences were found to be its warnings."""
    unlearner = Unlearner(model or make(), task or Classification(), method)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = unlearner.run(**(data or DATA), **arguments)
    said = [str(w.message) for w in caught if issubclass(w.category, UnlearningWarning)]
    assert said == list(result.warnings.values()) and set(result.warnings) <= set(KEYS)
    assert all("\n" not in sentence and len(sentence) < 400 for sentence in said)
    assert all(w.filename == __file__ for w in caught if issubclass(w.category, UnlearningWarning))
    return result


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))


def trained(model: nn.Module, x: Tensor, y: Tensor, steps: int = 60) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def clusters(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Four classes far apart."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 4
    return 4 * nn.functional.one_hot(y, 8).float() + torch.randn(count, 8, generator=generator), y


def cluster_batches() -> list:
    return [clusters(8, seed=2), clusters(12, seed=3)]


class Vector(nn.Module):
    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.head = nn.Linear(8, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)
