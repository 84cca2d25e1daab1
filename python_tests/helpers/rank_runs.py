"""The small network of the cases that ranks run, its data, and one run of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unlearn_ext import Unlearner
from unlearn_ext.distributed.shards import full
from unlearn_ext.distributed.wrappers import unwrapped
from unlearn_ext.methods import SFRon
from unlearn_ext.tasks import Classification

__all__ = ["SETTINGS", "Network", "batches", "go", "network", "rank", "ranks", "samples", "sets", "weights"]

SETTINGS: dict[str, Any] = {
    "rule": "adamw",
    "lr": 0.01,
    "weight_decay": 0.1,
    "iterations": 6,
    "forget_alpha": 0.5,
    "lambd": 0.5,
    "adaptive_eps": 1e-8,
    "max_norm": 0.01,
    "retain_max_norm": 0.3,
    "slow_rate": 0.7,
    "slow_freq": 2,
    "gamma": 0.5,
}


class Network(nn.Module):
    """Rows that no number of ranks divides, a tensor smaller than the world, tied weights and frozen ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.again = nn.Linear(7, 7)
        self.tied = nn.Linear(7, 7)
        self.tied.weight = self.again.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(7, 7)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.again(x)) + self.scale * torch.tanh(self.frozen(x))
        return self.head(torch.tanh(self.tied(x)))


def network(wrapper: str | None) -> nn.Module:
    torch.manual_seed(0)
    model = Network().double()
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if wrapper == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model.first)
        fully_shard(model)
    return model


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator).double(), torch.randint(0, 3, (count,), generator=generator)


def batches(count: int, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    inputs, labels = samples(count * size, seed)
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def sets(size: int = 5) -> dict[str, Any]:
    return {"forget": batches(3, size, 1), "retain": batches(4, size, 2)}


def weights(model: nn.Module) -> dict[str, list[float]]:
    return {name: full(p).flatten().tolist() for name, p in unwrapped(model).named_parameters()}


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def go(
    wrapper: str | None,
    *,
    data: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
    model: nn.Module | None = None,
    arguments: dict[str, Any] | None = None,
    **run: Any,
) -> dict[str, Any]:
    model = network(wrapper) if model is None else model
    method = SFRon(**{**SETTINGS, **(changes or {})})
    unlearner = Unlearner(model, Classification(), method, **(arguments or {}))
    result = unlearner.run(**(data or sets()), **run)
    found: dict[str, Any] = {"weights": weights(model), "history": result.history, "protection": result.protection}
    found["counts"] = result.counts
    if result.mask is not None:
        found["mask"] = {name: bits.flatten().tolist() for name, bits in result.mask.unpack().items()}
        found["weights_hash"] = result.mask.metadata.get("weights_hash")
        found["forget_hash"] = result.mask.metadata.get("forget_hash")
    if result.ema is not None:
        found["ema"] = {name: full(value).flatten().tolist() for name, value in result.ema.items()}
    return found
