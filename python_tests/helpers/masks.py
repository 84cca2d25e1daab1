"""A mask that several test files bind, save and compare, and a model to measure one on."""

from __future__ import annotations

import torch
from helpers.layouts import coin
from helpers.models import ConvNet, batches, make
from torch import Tensor, nn


def masks() -> dict[str, Tensor]:
    """In a model's order, which is neither that of the alphabet nor of sizes."""
    rng = torch.Generator().manual_seed(5)
    shapes = {"stem.weight": (6, 2, 3, 3), "stem.bias": (6,), "a.scale": (), "empty": (0, 4), "head": (33, 5)}
    return {name: coin(rng, shape, 0.3) for name, shape in shapes.items()}


def parameters_of(tensors: dict[str, Tensor], prefix: str = "") -> list[tuple[str, Tensor]]:
    return [(prefix + name, torch.zeros(tensor.shape)) for name, tensor in tensors.items()]


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype == torch.bool
        assert a[name].shape == b[name].shape and torch.equal(a[name], b[name]), name


def trained(dtype: torch.dtype = torch.float64, model: type[nn.Module] = ConvNet) -> nn.Module:
    """With running statistics that differ from a batch's."""
    own = make(model).to(dtype)
    with torch.no_grad():
        for x, _ in batches(4, 8, seed=9, dtype=dtype):
            own(x * 2 + 1)
    return own
