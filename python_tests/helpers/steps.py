"""States of a step and calls of ops.step_."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from helpers import oracles
from helpers.layouts import assert_ulps, normal, opmath
from torch import Tensor

from unlearn_ext import ops

MOMENTS = {"sgd": (), "momentum": ("first",), "adam": ("first", "second"), "adamw": ("first", "second")}


ARGUMENT = {"theta": "weights", "slow": "slow", "first": "first_moments", "second": "second_moments"}


HYPER = {"lr": 0.05, "momentum": 0.9, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.03}


FACTORS = {"forget_weight": 0.7, "retain_weight": 1.3, "forget_clip": 0.45, "retain_clip": 0.9}


State = dict[str, list[Tensor]]


def new_state(
    rng: torch.Generator, shapes: Sequence[Sequence[int]], dtype: torch.dtype, rule: str, slow: bool = False
) -> State:
    """Contiguous tensors as they stand in the middle of a run: |first| and sqrt(second) are alike."""
    wide = opmath(dtype)
    state = {"theta": [normal(rng, shape, dtype) for shape in shapes]}
    if "first" in MOMENTS[rule]:
        state["first"] = [normal(rng, shape, wide) for shape in shapes]
    if "second" in MOMENTS[rule]:
        state["second"] = [(m.square() + 0.1 * normal(rng, m.shape, wide).square()) for m in state["first"]]
    if slow:
        state["slow"] = [theta.to(wide) + 0.1 * normal(rng, theta.shape, wide) for theta in state["theta"]]
    return state


def call(state: State, forget: Sequence[Tensor] = (), retain: Sequence[Tensor] = (), **options: Any) -> None:
    """ops.step_ on a state; options of ops.scalars and of ops.step_ may be mixed."""
    own = {"rule", "bits", "mask_scope", "protect", "rounding_seed"} & options.keys()
    own_options = {name: options.pop(name) for name in own}
    tensors = {ARGUMENT[name]: tensors for name, tensors in state.items()}
    weights = tensors.pop("weights")
    scalars = ops.scalars(**options)
    ops.step_(weights, scalars=scalars, forget_grads=forget, retain_grads=retain, **tensors, **own_options)


def expect(
    state: State,
    forget: Sequence[Tensor] = (),
    retain: Sequence[Tensor] = (),
    masks: Sequence[Tensor] = (),
    **options: Any,
) -> list[dict[str, Any]]:
    """The transcription's answer for every tensor of a list."""
    return [
        oracles.step(
            {name: tensors[i].double().numpy() for name, tensors in state.items()},
            forget=forget[i].double().numpy() if forget else None,
            retain=retain[i].double().numpy() if retain else None,
            mask=masks[i].numpy() if masks else None,
            **options,
        )
        for i in range(len(state["theta"]))
    ]


def assert_state(state: State, expected: Sequence[dict[str, Any]]) -> None:
    """8 ulp of the opmath type, as the scalars are rounded to it too; half types: the last rounding and little more."""
    for name, tensors in state.items():
        for got, want in zip(tensors, expected, strict=True):
            limit = 8.0 if got.dtype in (torch.float32, torch.float64) else 0.51
            assert_ulps(got, want[name], limit, want.get(f"{name}_scale"))


def clone(state: State) -> State:
    return {name: [tensor.clone() for tensor in tensors] for name, tensors in state.items()}
