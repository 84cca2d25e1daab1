"""What the optimizer's tests share: parameters, masks, gradients, and a plain float64 transcription."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from helpers import oracles
from helpers.layouts import coin, normal, same_bits
from torch import Tensor, nn

from unlearn_ext.optim import UnlearnOptimizer

SHAPES = ((7, 5), (33,), (), (4, 3, 2, 2))
HYPER = {"lr": 0.05, "momentum": 0.9, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.03}
WITHOUT_MOMENTUM = {name: value for name, value in HYPER.items() if name != "momentum"}  # as sgd takes them
MOMENTS = {"sgd": (), "momentum": ("first",), "adam": ("first", "second"), "adamw": ("first", "second")}

Grads = list[Tensor | None]


def named(dtype: torch.dtype = torch.float64, shapes: Sequence[Sequence[int]] = SHAPES) -> list[tuple[str, Tensor]]:
    """The same parameters at every call."""
    rng = torch.Generator().manual_seed(1)
    return [(f"layer{i}.weight", nn.Parameter(normal(rng, shape, dtype))) for i, shape in enumerate(shapes)]


def masks_of(parameters: Sequence[tuple[str, Tensor]], probability: float = 0.5) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(2)
    return {name: coin(rng, p.shape, probability) for name, p in parameters}


def gradients(rng: torch.Generator, parameters: Sequence[tuple[str, Tensor]], scale: float = 1.0) -> Grads:
    return [scale * normal(rng, p.shape, p.dtype) for _, p in parameters]


def values(parameters: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
    return [p.detach().clone() for _, p in parameters]


def snapshot(optimizer: UnlearnOptimizer) -> dict[str, Tensor]:
    """Weights and every tensor of the state, by place."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = {f"{i}": p.detach().clone() for i, p in enumerate(parameters)}
    for i, p in enumerate(parameters):
        found |= {f"{i} {k}": torch.as_tensor(v).clone() for k, v in optimizer.state.get(p, {}).items()}
    return found


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert same_bits(a[name], b[name]), name


class Plain:
    """What the optimizer's documentation says, one tensor at a time in float64."""

    def __init__(self, weights: Sequence[Tensor], masks: Sequence[Tensor] | None, **options: Any):
        defaults = {"max_norm": None, "retain_max_norm": None, "forget_weight": 1.0, "retain_weight": 1.0}
        defaults |= {"slow_rate": 1.0, "slow_freq": 1, "mask_scope": "forget", "protect": False, "dual_state": False}
        defaults |= {"forget_rule": None, "forget_lr": None, **HYPER}
        self.o = {**defaults, **options}
        self.weights = [weight.double().numpy().copy() for weight in weights]
        self.masks = None if masks is None else [mask.numpy() for mask in masks]
        self.slow = [weight.copy() for weight in self.weights]
        self.moments: list[dict[str, Any]] = [{} for _ in weights]
        self.counts: list[dict[bool, int]] = [{} for _ in weights]
        self.retain_steps = 0
        self.clip = 1.0

    def _factor(self, grads: list, limit: float | None, weight: float, masked: bool) -> float:
        if limit is None:
            return 1.0
        kept = [g if not masked else g[self.masks[i]].reshape(-1) for i, g in enumerate(grads) if g is not None]
        return min(1.0, limit / (weight * math.sqrt(sum(float((g**2).sum()) for g in kept)) + 1e-6))

    def step(self, op: str, forget: Grads | None = None, retain: Grads | None = None) -> None:
        o, nothing = self.o, [None] * len(self.weights)
        forget, retain = (
            [None if g is None else g.double().numpy() for g in grads or nothing] for grads in (forget, retain)
        )
        masked = self.masks is not None and (op != "retain" or o["mask_scope"] == "all")
        own = op == "forget" and o["dual_state"]
        rule = (o["forget_rule"] or o["rule"]) if own else o["rule"]
        lr = o["forget_lr"] if op == "forget" and o["forget_lr"] is not None else o["lr"]
        clip = self._factor(forget, o["max_norm"], o["forget_weight"], masked)
        retain_clip = self._factor(
            retain, o["retain_max_norm"], o["retain_weight"], masked and o["mask_scope"] == "all"
        )
        if op != "retain":
            self.clip = clip
        self.retain_steps += op != "forget"
        closes = op != "forget" and self.retain_steps % o["slow_freq"] == 0 and o["slow_rate"] != 1.0
        for i, theta in enumerate(self.weights):
            mask = self.masks[i] if masked else None
            state = {"theta": theta} | ({"slow": self.slow[i]} if closes else {})
            if forget[i] is None and retain[i] is None:
                if closes:
                    moved = self.slow[i] + o["slow_rate"] * (theta - self.slow[i])
                    keep = mask if o["protect"] and masked else True
                    self.weights[i], self.slow[i] = (np.where(keep, moved, old) for old in state.values())
                continue
            count = self.counts[i][own] = self.counts[i].get(own, 0) + 1
            for name in MOMENTS[rule]:
                state[name] = self.moments[i].get((own, name), 0 * theta)
            new = oracles.step(
                state,
                rule=rule,
                lr=lr,
                forget=forget[i],
                retain=retain[i],
                mask=mask,
                step=count,
                forget_clip=clip,
                retain_clip=retain_clip,
                beta1=o["betas"][0],
                beta2=o["betas"][1],
                **{k: o[k] for k in ("forget_weight", "retain_weight", "momentum", "eps", "weight_decay")},
                **{k: o[k] for k in ("mask_scope", "protect", "slow_rate")},
            )
            self.weights[i] = new["theta"]
            self.slow[i] = new.get("slow", self.slow[i])
            self.moments[i] |= {(own, name): new[name] for name in MOMENTS[rule]}


def assert_follows(parameters: Sequence[tuple[str, Tensor]], plain: Plain) -> None:
    for (name, p), want in zip(parameters, plain.weights, strict=True):
        torch.testing.assert_close(
            p.detach(), torch.as_tensor(want), rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )
