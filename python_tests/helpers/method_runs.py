"""Short runs of any method on the small classifier."""

from __future__ import annotations

import torch
from helpers.models import batches, samples
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from unlearn_ext import Unlearner
from unlearn_ext.methods import find
from unlearn_ext.tasks import Classification

__all__ = ["SHORT", "loaders", "run", "same", "sets", "short"]

SHORT = {"iterations": 12, "lr": 0.02}


def short(name: str, **changes):
    settings = {"lr": SHORT["lr"], "epochs": 2, "msteps": 1} if name == "scrub" else SHORT
    return find(name)(**{**settings, **changes})


def loaders(name: str, seed: int = 3) -> dict[str, DataLoader]:
    """Shuffled: one draws from the global generator, the others have generators of their own."""
    wanted = {"forget": (22, 1), "retain": (37, 2)}
    method = find(name)
    wanted |= {"learn": (17, 5)} if method.learns else {}
    wanted |= {"unseen": (15, 6)} if method.needs_unseen else {}
    found = {}
    for i, (key, (count, data)) in enumerate(wanted.items()):
        own = torch.Generator().manual_seed(seed + i) if key != "forget" else None
        found[key] = DataLoader(TensorDataset(*samples(count, data)), batch_size=4, shuffle=True, generator=own)
    return found


def sets(name: str = "sfron") -> dict[str, list]:
    found = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    found |= {"learn": batches(4, 6, seed=5)} if find(name).learns else {}
    return found | ({"unseen": batches(2, 6, seed=6)} if find(name).needs_unseen else {})


def run(model: nn.Module, name: str, data: dict | None = None, changes: dict | None = None, **arguments):
    return Unlearner(model, Classification(), short(name, **(changes or {}))).run(**(data or sets(name)), **arguments)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
