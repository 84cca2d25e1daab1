"""Valid arguments of every operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from helpers.layouts import SEED, coin, normal, opmath
from torch import Tensor

from unlearn_ext import ops

SHAPES = ((5, 7), (33,), (), (0,))


def numbers(dtype: torch.dtype = torch.float32, shapes: Sequence[Sequence[int]] = SHAPES, seed: int = SEED) -> list:
    rng = torch.Generator().manual_seed(seed)
    return [normal(rng, shape, dtype) for shape in shapes]


def some_bits(shapes: Sequence[Sequence[int]] = SHAPES) -> list[Tensor]:
    rng = torch.Generator().manual_seed(SEED)
    return ops.pack_bits([coin(rng, shape) for shape in shapes])


def step_operands(rule: str = "adamw", dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    """Valid arguments of ops.step_ with every operand that the rule takes."""
    wide = opmath(dtype)
    operands = {
        "weights": numbers(dtype, seed=1),
        "forget_grads": numbers(dtype, seed=2),
        "retain_grads": numbers(dtype, seed=3),
        "slow": numbers(wide, seed=4),
        "bits": some_bits(),
        "rule": rule,
        "scalars": ops.scalars(lr=0.1, weight_decay=0.1, momentum=0.9, slow_rate=0.5),
    }
    if rule != "sgd":
        operands["first_moments"] = numbers(wide, seed=5)
    if rule in ("adam", "adamw"):
        operands["second_moments"] = [value.square() for value in numbers(wide, seed=6)]
    return operands | changes


def fisher_operands(**changes: Any) -> dict[str, Any]:
    return {"fisher": numbers(seed=1), "grads": numbers(seed=2)} | changes


def products_operands(**changes: Any) -> dict[str, Any]:
    return {"forget_grads": numbers(seed=1), "retain_grads": numbers(seed=2), "bits": some_bits()} | changes


def ratio_operands(**changes: Any) -> dict[str, Any]:
    fishers = {"forget_fisher": numbers(seed=1), "retain_fisher": numbers(seed=2)}
    return {name: [value.square() for value in values] for name, values in fishers.items()} | changes


def top_operands(**changes: Any) -> dict[str, Any]:
    return {"scores": numbers(seed=1), "k": 30, "other": numbers(seed=2), "score": "product"} | changes


def unpack_operands(**changes: Any) -> dict[str, Any]:
    return {"bits": some_bits(), "like": numbers()} | changes


def update_operands(**changes: Any) -> dict[str, Any]:
    lists = ("weights", "forget_grads", "retain_grads", "slow")
    operands = {name: numbers(seed=i) for i, name in enumerate(lists)}
    return {**operands, "bits": some_bits(), "lr": 0.1, "slow_rate": 0.5, **changes}


def tensors_in(operands: dict[str, Any]) -> list[Tensor]:
    """All that have memory of the usual kind."""
    lists = [value if isinstance(value, list) else [value] for value in operands.values()]
    tensors = [value for values in lists for value in values if isinstance(value, Tensor)]
    return [tensor for tensor in tensors if tensor.layout == torch.strided and not tensor.is_meta]
