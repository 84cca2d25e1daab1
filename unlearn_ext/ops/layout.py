"""Rules, scores and scalars by name, in the order in which the kernels number them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..utils.arguments import check_count, check_number

__all__ = ["MASK_SCOPES", "RULES", "SCALARS", "SCORES", "number", "scalars"]

RULES = ("sgd", "momentum", "adam", "adamw")
MASK_SCOPES = ("forget", "all")
SCORES = ("value", "magnitude", "product", "ratio")

# Layout of the scalar tensor; enum ScalarIndex in csrc/math/step.h lists the same names.
SCALARS = (
    "lr",
    "forget_weight",
    "retain_weight",
    "forget_clip",
    "retain_clip",
    "momentum",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "step",
    "bias_correction1",
    "bias_correction2",
    "slow_rate",
    "inverse_scale",
    "skip",
)


def number(
    op: str,
    argument: str,
    value: Any,
    expected: str = "a finite number",
    fits: Callable[[float], bool] = math.isfinite,
) -> float:
    # Compiled graphs take any number. Else a plain one is looked at here: steps are many.
    if torch.compiler.is_compiling() or (isinstance(value, float) and fits(value)):
        plain: float = value
        return plain
    return check_number(f"{op}: {argument}", value, expected, fits)


def scalars(
    *,
    lr: float | Tensor,
    forget_weight: float | Tensor = 1.0,
    retain_weight: float | Tensor = 1.0,
    forget_clip: float | Tensor = 1.0,
    retain_clip: float | Tensor = 1.0,
    momentum: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Tensor = 0.0,
    step: int = 1,
    slow_rate: float | Tensor = 1.0,
    inverse_scale: float | Tensor = 1.0,
    skip: bool | Tensor = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """The scalars of one :func:`step_` as a float64 tensor, in the order of :data:`SCALARS`.

    They live in a tensor so that a native step need not wait for the device. Those that may be 0-d tensors, as
    computed from :func:`gradient_products` or learnt through :func:`update`, are copied without waiting either, and
    autograd follows them.

    Args:
        lr: learning rate.
        forget_weight, retain_weight: factors of the two gradients.
        forget_clip, retain_clip: further factors of the two gradients, from clipping by norm.
        momentum: factor of the momentum buffer, for rule ``momentum``.
        beta1, beta2, eps: of rules ``adam`` and ``adamw``.
        weight_decay: coupled (added to the gradient), or decoupled for ``adamw``.
        step: how many steps the moments have seen including this one, from 1; for the bias corrections.
        slow_rate: how far the slow weights move towards the fast ones.
        inverse_scale: 1 / loss scale, a factor of both gradients.
        skip: true when a gradient is not finite; the step then writes nothing.

    Raises:
        InputError: a number that is not finite, a tensor of several elements, or a ``step`` below 1.
    """
    if not isinstance(step, int) or step < 1:
        step = check_count("scalars: step", step)
    values = {
        "lr": lr,
        "forget_weight": forget_weight,
        "retain_weight": retain_weight,
        "forget_clip": forget_clip,
        "retain_clip": retain_clip,
        "momentum": momentum,
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
        "weight_decay": weight_decay,
        "step": step,
        "bias_correction1": 0.0,
        "bias_correction2": 0.0,
        "slow_rate": slow_rate,
        "inverse_scale": inverse_scale,
        "skip": skip,
    }
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise InputError(f"scalars: {name}: expected a number or a 0-d tensor, got shape {list(value.shape)}")
        elif not isinstance(value, bool):
            values[name] = number("scalars", name, value, "a finite number or a 0-d tensor")
    values["bias_correction1"], values["bias_correction2"] = 1.0 - beta1**step, 1.0 - beta2**step
    ordered = [values[name] for name in SCALARS]
    numbers = [0.0 if isinstance(v, Tensor) else float(v) for v in ordered]
    result = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    if device is not None and torch.device(device).type == "cuda":
        result = result.pin_memory().to(device, non_blocking=True)  # from pageable memory the copy would wait
    elif device is not None:
        result = result.to(device)
    for i, value in enumerate(ordered):
        if isinstance(value, Tensor):
            result[i] = value
    return result
