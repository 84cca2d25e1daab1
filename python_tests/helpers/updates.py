"""Operands and scalars of update, its calls, and a plain PyTorch transcription, as several test files take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import oracles
from helpers.layouts import normal, opmath
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unlearn_ext import ops

SCALARS = {
    "lr": 0.3,
    "forget_weight": 0.7,
    "retain_weight": 1.3,
    "forget_clip": 0.45,
    "retain_clip": 0.9,
    "weight_decay": 0.2,
    "slow_rate": 0.35,
}
LISTS = ("weights", "slow", "forget_grads", "retain_grads")
# Which lists a call has besides the weights.
PARTS = {
    "forget": ("forget_grads",),
    "retain": ("retain_grads",),
    "both": ("forget_grads", "retain_grads"),
    "forget-slow": ("forget_grads", "slow"),
    "retain-slow": ("retain_grads", "slow"),
    "both-slow": ("forget_grads", "retain_grads", "slow"),
    "slow": ("slow",),
}
parts_cases = pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
SCOPES = (None, "forget", "all")
mask_cases = pytest.mark.parametrize("mask_scope", SCOPES)

Operands = dict[str, list[Tensor]]


def new_operands(
    rng: torch.Generator,
    shapes: Sequence[Sequence[int]],
    parts: Sequence[str] = LISTS,
    dtype: torch.dtype = torch.float64,
    **dtypes: torch.dtype,
) -> Operands:
    """Contiguous operands of one call; `dtypes` names those of lists that differ from the weights'."""
    dtypes = {"slow": opmath(dtype)} | dtypes
    return {
        name: [normal(rng, shape, dtypes.get(name, dtype)) for shape in shapes]
        for name in LISTS
        if name == "weights" or name in parts
    }


def followed(operands: Operands) -> Operands:
    return {name: [tensor.detach().requires_grad_() for tensor in tensors] for name, tensors in operands.items()}


def new_scalars() -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in SCALARS.items()}


def flat(operands: Operands) -> list[Tensor]:
    return [tensor for tensors in operands.values() for tensor in tensors]


def call(operands: Operands, bits: Sequence[Tensor] = (), mask_scope: str | None = None, **scalars: Any) -> list:
    return ops.update(**operands, bits=bits, mask_scope=mask_scope or "forget", **scalars)


def transcription(
    operands: Operands, masks: Sequence[Tensor] = (), mask_scope: str | None = None, **scalars: Any
) -> list[Tensor]:
    rows = [
        [operands[name][i] if name in operands else None for name in LISTS] for i in range(len(operands["weights"]))
    ]
    masks = masks or [None] * len(rows)
    return [
        oracles.update(*row, mask, mask_scope or "forget", **scalars) for row, mask in zip(rows, masks, strict=True)
    ]


class Calls(TorchDispatchMode):
    """The names of this package's operators, in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "unlearn_ext":
            self.calls.append((func._opname, args))
        return func(*args, **kwargs or {})
