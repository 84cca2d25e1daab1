"""Which parameters and gradients the kernels take: one sentence, with the parameter's name, for those they do not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .arguments import describe

__all__ = ["FLOATING", "check_gradient", "check_layers", "check_parameters", "fits", "no_gradient"]

FLOATING = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))


def check_parameters(named: Iterable[tuple[str, Tensor]]) -> None:
    """Whether these can be moved. Frozen ones, which may be quantised, get no gradient and are not looked at.

    Raises:
        InputError: a parameter is complex or of another dtype, or was made in inference mode.
    """
    for name, p in named:
        if not p.requires_grad:
            continue
        if p.dtype not in FLOATING:
            raise InputError(
                f"the parameter {name} is of {p.dtype}, and only float64, float32, bfloat16 and float16 can be moved: "
                "freeze it with requires_grad_(False), or hold a complex one as two real ones"
            )
        if p.is_inference():
            raise InputError(
                f"the parameter {name} was made in inference mode, which no step can change afterwards: make the model "
                "outside of torch.inference_mode()"
            )


def no_gradient(name: str) -> InputError:
    """No gradient arrives at any weight from the losses of a set."""
    return InputError(
        f"the {name} loss does not depend on the trained weights: train those that it uses, take no_grad, detach and "
        "argmax out of the model and the task, unmerge adapters, and checkpoint activations with use_reentrant=False"
    )


def fits(gradient: Any) -> bool:
    """Whether it is a dense tensor of a dtype that the kernels read."""
    return isinstance(gradient, Tensor) and gradient.layout is torch.strided and gradient.dtype in FLOATING


def check_gradient(op: str, name: str, gradient: Any) -> None:
    """Raises InputError, which names operation and parameter, for what :func:`fits` refuses."""
    if not isinstance(gradient, Tensor):
        raise InputError(f"{op}: the gradient of {name} is {describe(gradient)}: expected a tensor, or None for none")
    if gradient.layout is not torch.strided:
        raise _sparse(op, name)
    if gradient.dtype not in FLOATING:
        raise InputError(
            f"{op}: the gradient of {name} is of {gradient.dtype}: expected one of float64, float32, bfloat16 or "
            "float16"
        )


def check_layers(op: str, model: nn.Module) -> None:
    """Raises InputError for a layer whose gradient will be sparse, where torch.func trips over it first."""
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.sparse and layer.weight.requires_grad:
            raise _sparse(op, f"{name}.weight".removeprefix("."))


def _sparse(op: str, name: str) -> InputError:
    return InputError(
        f"{op}: the gradient of {name} is sparse; make it dense with .to_dense(), or build the layer with sparse=False"
    )
