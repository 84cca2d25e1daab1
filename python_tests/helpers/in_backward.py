"""A network, its losses and the optimizer's steps in backward, as several test files take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.layouts import coin, same_bits
from torch import Tensor, nn

from unlearn_ext import SaliencyMask, UnlearnOptimizer


class Net(nn.Module):
    """A tied, a frozen and an unused weight, and one that lies in memory column by column."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 7)
        self.head, self.frozen = nn.Linear(7, 3), nn.Linear(7, 7)
        self.third.weight = self.second.weight
        self.head.weight = nn.Parameter(self.head.weight.detach().t().contiguous().t())
        self.unused = nn.Parameter(torch.ones(4))
        self.frozen.requires_grad_(False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return self.head(torch.tanh(self.frozen(x)))


def loss_of(model: nn.Module, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    output = model(torch.randn(6, 5, generator=rng).to(dtype))
    return output.to(torch.float64 if dtype == torch.float64 else torch.float32).square().mean()


def mask_of(model: nn.Module) -> SaliencyMask:
    rng = torch.Generator().manual_seed(2)
    return SaliencyMask.from_dict({n: coin(rng, p.shape) for n, p in model.named_parameters() if p.requires_grad})


def optimizer_of(model: nn.Module, groups: bool = False, masked: bool = False, **options: Any) -> UnlearnOptimizer:
    named: Any = list(model.named_parameters())
    if groups:
        named = [
            {"params": [(n, p) for n, p in named if "bias" in n], "lr": 0.5, "weight_decay": 0.0, "slow_rate": 0.25},
            {"params": [(n, p) for n, p in named if "bias" not in n], "forget_weight": 1.5},
        ]
    return UnlearnOptimizer(named, mask=mask_of(model) if masked else None, **{"lr": 0.1, **options})


def everything(model: nn.Module, optimizer: UnlearnOptimizer) -> dict[str, Tensor]:
    """Weights, and every number of the optimizer's state."""
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    saved = optimizer.state_dict()
    for index, entries in saved["state"].items():
        found |= {f"{index} {key}": torch.as_tensor(value).clone() for key, value in entries.items()}
    for i, group in enumerate(saved["param_groups"]):
        found |= {f"group {i} {key}": torch.tensor(group[key]) for key in ("lr", "retain_steps")}
    return found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert same_bits(a[name], b[name]), name


def steps(
    optimizer: UnlearnOptimizer, model: nn.Module, in_backward: bool, count: int = 5, loss: Callable = loss_of
) -> None:
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.9**t)
    for t in range(count):
        for side, sign in (("forget", -0.1), ("retain", 1.0)) if t % 2 == 0 else (("retain", 1.0),):
            optimizer.zero_grad()
            if in_backward:
                with optimizer.step_in_backward(side):
                    (sign * loss(model, 2 * t + len(side) % 5)).backward()
                assert all(p.grad is None for p in model.parameters())
            else:
                (sign * loss(model, 2 * t + len(side) % 5)).backward()
                getattr(optimizer, f"{side}_step")()
        scheduler.step()


def dit(**shape: int) -> nn.Module:
    pytest.importorskip("diffusers")
    from helpers.pipelines import small_dit

    return small_dit(**shape)


def dit_loss(model: nn.Module, seed: int, size: int = 8, count: int = 3) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, size, size, generator=rng)
    labels = torch.randint(0, 10, (count,), generator=rng)
    return model(x, timestep=torch.arange(count) + 5, class_labels=labels).sample.square().mean()


class Spoilt(nn.Module):
    """The gradient of ``middle`` is not finite; that of ``last`` comes before it, that of ``first`` after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Parameter(torch.ones(3)) for _ in range(3))
        self.middle.register_hook(lambda g: g * self.factor)
        self.factor = 1.0

    def forward(self) -> Tensor:
        return ((self.first * 2).tanh() * self.middle).tanh().mul(self.last).sum()
