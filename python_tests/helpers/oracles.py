"""Plain transcriptions of the formulas in float64. They import nothing from the package that they check.

The first part says what each operator computes for one tensor. The second is SFR-on's released loop for
classifiers (arXiv 2409.19732, K1nght/Unified-Unlearning-w-Remain-Geometry), written with torch.optim.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Array = np.ndarray
Batch = tuple[Tensor, Tensor]

# --- Operators ----------------------------------------------------------------------------------------------


def step(
    state: Mapping[str, Array],
    *,
    rule: str,
    lr: float,
    forget: Array | None = None,
    retain: Array | None = None,
    mask: Array | None = None,
    mask_scope: str = "forget",
    protect: bool = False,
    forget_weight: float = 1.0,
    retain_weight: float = 1.0,
    forget_clip: float = 1.0,
    retain_clip: float = 1.0,
    momentum: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int = 1,
    slow_rate: float = 1.0,
    inverse_scale: float = 1.0,
) -> dict[str, Array]:
    """One step of one tensor. `state` has "theta" and what the rule needs of "first", "second", "slow".

    The result has the same keys, and to each that changes its "..._scale": the largest magnitude that enters the
    number. An error is measured in ulps of it, so that cancellation does not count as error.
    """
    old = {name: np.asarray(value, np.float64) for name, value in state.items()}
    new = dict(old)
    theta = old["theta"]
    update_scale = np.zeros_like(theta)

    if forget is not None or retain is not None:
        g = np.zeros_like(theta)
        g_scale = np.zeros_like(theta)
        if forget is not None:
            part = inverse_scale * forget_weight * forget_clip * np.asarray(forget, np.float64)
            part = part if mask is None else np.where(mask, part, 0.0)
            g, g_scale = g + part, g_scale + abs(part)
        if retain is not None:
            part = inverse_scale * retain_weight * retain_clip * np.asarray(retain, np.float64)
            part = part if mask is None or mask_scope == "forget" else np.where(mask, part, 0.0)
            g, g_scale = g + part, g_scale + abs(part)

        if rule == "adamw":
            theta = theta - lr * weight_decay * theta
        else:
            g = g + weight_decay * theta
            g_scale = g_scale + abs(weight_decay * theta)

        if rule == "sgd":
            theta = theta - lr * g
            update_scale = lr * g_scale
        elif rule == "momentum":
            new["first"] = momentum * old["first"] + g
            new["first_scale"] = momentum * abs(old["first"]) + g_scale
            theta = theta - lr * new["first"]
            update_scale = lr * new["first_scale"]
        else:
            new["first"] = beta1 * old["first"] + (1 - beta1) * g
            new["first_scale"] = abs(old["first"]) + g_scale
            new["second"] = beta2 * old["second"] + (1 - beta2) * g * g
            new["second_scale"] = beta2 * old["second"] + (1 - beta2) * g_scale * g_scale
            step_size = lr / (1 - beta1**step)
            denominator = np.sqrt(new["second"]) / math.sqrt(1 - beta2**step) + eps
            theta = theta - step_size * new["first"] / denominator
            update_scale = step_size * new["first_scale"] / denominator

    new["theta_scale"] = np.maximum.reduce([abs(old["theta"]), abs(theta), update_scale])
    if "slow" in old:
        theta = old["slow"] + slow_rate * (theta - old["slow"])
        new["slow"] = theta
        new["theta_scale"] = np.maximum(new["theta_scale"], abs(old["slow"]))
        new["slow_scale"] = new["theta_scale"]
    new["theta"] = theta
    if protect and mask is not None:
        new.update({name: np.where(mask, new[name], old[name]) for name in old})
    return new


def update(
    theta: Tensor,
    slow: Tensor | None = None,
    forget: Tensor | None = None,
    retain: Tensor | None = None,
    mask: Tensor | None = None,
    mask_scope: str = "forget",
    *,
    lr: Tensor | float,
    forget_weight: Tensor | float = 1.0,
    retain_weight: Tensor | float = 1.0,
    forget_clip: Tensor | float = 1.0,
    retain_clip: Tensor | float = 1.0,
    weight_decay: Tensor | float = 0.0,
    slow_rate: Tensor | float = 1.0,
) -> Tensor:
    """The plain step of one tensor in float64, made of operations that autograd differentiates by itself."""
    theta = theta.double()
    result = theta
    if forget is not None or retain is not None:
        g = weight_decay * theta
        if forget is not None:
            g = g + forget_weight * forget_clip * (forget.double() if mask is None else masked(forget, mask))
        if retain is not None:
            everywhere = mask is None or mask_scope == "forget"
            g = g + retain_weight * retain_clip * (retain.double() if everywhere else masked(retain, mask))
        result = theta - lr * g
    return result if slow is None else slow.double() + slow_rate * (result - slow.double())


def masked(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values.double(), 0.0)


def products(
    forget: Iterable[Array] = (),
    retain: Iterable[Array] = (),
    masks: Iterable[Array] | None = None,
    mask_scope: str = "forget",
) -> list[float]:
    """[Σ g_f², Σ g_r², Σ g_f g_r, number of non-finite entries] over whole lists, exactly rounded sums."""
    masks = None if masks is None else list(masks)

    def flat(arrays: Iterable[Array], masked: bool) -> Array:
        arrays = [np.asarray(array, np.float64) for array in arrays]
        if masked and masks is not None and arrays:
            arrays = [np.where(mask, array, 0.0) for mask, array in zip(masks, arrays, strict=True)]
        return np.concatenate([array.reshape(-1) for array in arrays] or [np.zeros(0)])

    f, r = flat(forget, True), flat(retain, mask_scope == "all")
    count = float((~np.isfinite(f)).sum() + (~np.isfinite(r)).sum())
    if count:
        return [math.nan, math.nan, math.nan, count]
    cross = f * r if f.size == r.size else np.zeros(0)
    return [math.fsum(f * f), math.fsum(r * r), math.fsum(cross), count]


def fisher(accumulated: Array, gradient: Array, weight: float = 1.0) -> Array:
    """F + weight g²."""
    return np.asarray(accumulated, np.float64) + weight * np.asarray(gradient, np.float64) ** 2


def ratio(
    forget_fisher: Array,
    retain_fisher: Array,
    *,
    gamma: float = 1.0,
    eps: float = 1e-15,
    forget_scale: float = 1.0,
    retain_scale: float = 1.0,
) -> Array:
    """The quotient that SFR-on compares with gamma, divided by gamma: a weight is kept where this is >= 1."""
    f = np.asarray(forget_fisher, np.float64) * forget_scale + eps
    r = np.asarray(retain_fisher, np.float64) * retain_scale + eps
    return f / r / gamma


def score(
    kind: str, value: Array, other: Array | None, *, eps: float, forget_scale: float, retain_scale: float
) -> Array:
    """What top_bits ranks weights by, computed in the dtype of the arrays."""
    with np.errstate(all="ignore"):
        if kind == "value":
            return value
        if kind == "magnitude":
            return abs(value)
        if kind == "product":
            return abs(value * other)
        one = value.dtype.type
        numerator = value * one(forget_scale) + one(eps)
        return numerator / (other * one(retain_scale) + one(eps))


def top(scores: Iterable[Array], k: int) -> list[Array]:
    """The k largest of all flat arrays together: the first of equal ones, NaN last."""
    arrays = [np.asarray(array, np.float64) for array in scores]
    flat = np.concatenate([*arrays, np.zeros(0)])
    nan = np.isnan(flat)
    order = np.lexsort((np.arange(flat.size), np.where(nan, 0.0, -flat), nan))  # the last key decides first
    keep = np.zeros(flat.size, bool)
    keep[order[:k]] = True
    return np.split(keep, np.cumsum([array.size for array in arrays])[:-1])


def pack(mask: Array) -> list[int]:
    """Bit i % 32 of word i // 32, as signed 32-bit numbers; `mask` is flat and in memory order."""
    words = [0] * math.ceil(len(mask) / 32)
    for i, keep in enumerate(mask):
        words[i // 32] |= int(keep) << (i % 32)
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


# --- SFR-on for classifiers ---------------------------------------------------------------------------------


def schedule(kind: str, base: float, t: int, iterations: int) -> float:
    """`base` decayed over the 0-based iteration t."""
    left = 1 - t / iterations
    factors = {
        "constant": 1.0,
        "cosine": (1 + math.cos(math.pi * t / iterations)) / 2,
        "linear": left,
        "quadratic": left**2,
    }
    return base * factors[kind]


def diagonal_fisher(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Mean over the batches of the squared gradient of the batch-mean loss, in eval mode.

    A parameter that no batch gives a gradient is absent.
    """
    model.eval()
    total: dict[str, Tensor] = {}
    count = 0
    for inputs, labels in batches:
        model.zero_grad(set_to_none=True)
        functional.cross_entropy(model(_double(inputs)), labels).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, torch.zeros_like(parameter)) + parameter.grad**2
        count += 1
    model.zero_grad(set_to_none=True)
    return {name: value.detach() / count for name, value in total.items()}


def saliency_mask(
    model: nn.Module, forget: Iterable[Batch], retain: Iterable[Batch], gamma: float, eps: float
) -> dict[str, Tensor]:
    """keep = (F_f + eps) / (F_r + eps) >= gamma; a weight that never got a gradient is not kept."""
    f, r = diagonal_fisher(model, forget), diagonal_fisher(model, retain)
    nothing = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    return nothing | {name: (f[name] + eps) / (r[name] + eps) >= gamma for name in f.keys() & r.keys()}


def adaptive_loss(losses: Tensor, lambd: float, eps: float) -> Tensor:
    """Σ (c_i / Σc) l_i with c_i = 1 / (l_i^λ + eps), the coefficients being constants."""
    c = 1 / (losses.detach() ** lambd + eps)
    return (c / c.sum() * losses).sum()


def sfron(
    model: nn.Module,
    forget: Iterable[Batch],
    retain: Iterable[Batch],
    *,
    rule: str = "momentum",
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    iterations: int = 1500,
    forget_freq: int = 5,
    forget_alpha: float = 25.0,
    lambd: float = 0.5,
    gamma: float | None = 1.0,
    max_norm: float | None = 7.0,
    retain_max_norm: float | None = None,
    slow_rate: float = 1.0,
    slow_freq: int = 1,
    adaptive_eps: float = 1e-15,
    fisher_eps: float = 1e-15,
    forget_schedule: str = "cosine",
    lr_schedule: str = "cosine",
    update: str = "sequential",
    dual_state: bool = False,
    forget_rule: str | None = None,
    forget_lr: float | None = None,
) -> tuple[list[Tensor], dict[str, Tensor] | None]:
    """The released loop on a float64 copy of `model`.

    Returns the flattened weights after every iteration, and the mask by name (None without one). Batches are
    (inputs, labels) and are iterated again whenever they run out; `model` stays as it is.
    """
    model = copy.deepcopy(model).double()
    parameters = dict(model.named_parameters())
    mask = None if gamma is None else saliency_mask(model, forget, retain, gamma, fisher_eps)
    optimizer = forgetter = _optimizer(rule, list(parameters.values()), lr, momentum, weight_decay)
    if dual_state:
        forgetter = _optimizer(forget_rule or rule, list(parameters.values()), lr, momentum, weight_decay)
    slow = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    next_forget, next_retain = _endless(forget), _endless(retain)
    model.train()

    def forget_gradients(alpha: float) -> None:
        """Fills .grad with the masked, clipped gradient of -alpha times the adaptive loss."""
        inputs, labels = next(next_forget)
        optimizer.zero_grad(set_to_none=True)
        losses = functional.cross_entropy(model(_double(inputs)), labels, reduction="none")
        (-alpha * adaptive_loss(losses, lambd, adaptive_eps)).backward()
        for name, parameter in parameters.items():
            if mask is not None and parameter.grad is not None:
                parameter.grad = torch.where(mask[name], parameter.grad, 0.0)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(parameters.values(), max_norm)

    def retain_gradients() -> None:
        inputs, labels = next(next_retain)
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(_double(inputs)), labels).backward()
        if retain_max_norm is not None:
            nn.utils.clip_grad_norm_(parameters.values(), retain_max_norm)

    trajectory = []
    for t in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = schedule(lr_schedule, lr, t, iterations)
        forgets = t % forget_freq == 0
        held: dict[str, Tensor] = {}
        if forgets:
            forget_gradients(schedule(forget_schedule, forget_alpha, t, iterations))
            if update == "sequential":
                rate = lr if forget_lr is None else forget_lr
                for group in forgetter.param_groups:
                    group["lr"] = schedule(lr_schedule, rate, t, iterations)
                forgetter.step()
                for group in optimizer.param_groups:
                    group["lr"] = schedule(lr_schedule, lr, t, iterations)
            else:
                held = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        retain_gradients()
        for name, gradient in held.items():
            own = parameters[name].grad
            parameters[name].grad = gradient if own is None else gradient + own
        optimizer.step()
        if slow_rate != 1.0 and (t + 1) % slow_freq == 0:
            for name, parameter in parameters.items():
                parameter.data = (1 - slow_rate) * slow[name] + slow_rate * parameter.data
                slow[name] = parameter.data.clone()
        trajectory.append(torch.cat([p.detach().reshape(-1) for p in parameters.values()]))
    return trajectory, mask


def _optimizer(
    rule: str, parameters: list[Tensor], lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    makers: dict[str, Callable[..., Any]] = {
        "sgd": torch.optim.SGD,
        "momentum": lambda *a, **k: torch.optim.SGD(*a, momentum=momentum, **k),
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    return makers[rule](parameters, lr=lr, weight_decay=weight_decay, foreach=False)


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches


def _double(inputs: Tensor) -> Tensor:
    return inputs.double() if inputs.is_floating_point() else inputs
