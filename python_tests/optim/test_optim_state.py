"""UnlearnOptimizer's state: saved, loaded, refused, copied and pickled."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.layouts import coin
from helpers.optimizers import HYPER, SHAPES, assert_same_bits, gradients, masks_of, named, snapshot, values
from torch import Tensor, nn

from unlearn_ext.errors import InputError
from unlearn_ext.optim import UnlearnOptimizer
from unlearn_ext.saliency import SaliencyMask

STATEFUL = {
    "momentum": {"rule": "momentum", "slow_rate": 0.5, "slow_freq": 3, "max_norm": 1.0},
    "adamw": {"rule": "adamw", "slow_rate": 0.5, "slow_freq": 3, "stochastic_rounding": True, "protect": True},
    "dual": {"rule": "adam", "dual_state": True, "forget_rule": "momentum", "forget_lr": 0.3},
}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("options", STATEFUL.values(), ids=STATEFUL.keys())
def test_state_dict_round_trip(options: dict[str, Any], dtype: torch.dtype) -> None:
    def build(weights: Sequence[Tensor] | None = None) -> tuple[list, UnlearnOptimizer, Any]:
        parameters = named(dtype)
        parameters[3] = ("layer3.weight", nn.Parameter(parameters[3][1].to(memory_format=torch.channels_last)))
        for (_, p), weight in zip(parameters, weights or values(parameters), strict=True):
            p.data.copy_(weight)
        mask = SaliencyMask.from_dict(masks_of(parameters))
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.02}]
        optimizer = UnlearnOptimizer(groups, mask=mask, **{**HYPER, **options})
        return parameters, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def train(parameters: list, optimizer: UnlearnOptimizer, scheduler: Any, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        for skipped in (0, 1, None, 3):
            optimizer.forget_step(gradients(rng, parameters))
            optimizer.retain_step([g if i != skipped else None for i, g in enumerate(gradients(rng, parameters))])
            scheduler.step()

    parameters, optimizer, scheduler = build()
    train(parameters, optimizer, scheduler, seed=1)  # 4 retain steps: saved within a round
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    other_parameters, other, other_scheduler = build(values(parameters))
    other.load_state_dict(saved["optimizer"])
    other_scheduler.load_state_dict(saved["scheduler"])
    assert_same_bits(snapshot(optimizer), snapshot(other))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [value for state in other.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert {t.dtype for t in tensors if t.dim()} == {wide}
    for p, q in zip(optimizer.state, other.state, strict=True):
        for name, value in optimizer.state[p].items():
            if isinstance(value, Tensor):
                assert other.state[q][name].stride() == value.stride()

    train(parameters, optimizer, scheduler, seed=2)
    train(other_parameters, other, other_scheduler, seed=2)
    assert_same_bits(snapshot(optimizer), snapshot(other))


def test_a_loaded_state_is_a_copy(rng: torch.Generator) -> None:
    parameters = named()
    optimizer = UnlearnOptimizer(parameters, rule="momentum", **HYPER)
    optimizer.retain_step(gradients(rng, parameters))
    saved = optimizer.state_dict()
    kept = saved["state"][0]["momentum_buffer"].clone()
    other = UnlearnOptimizer(named(), rule="momentum", **HYPER)
    other.load_state_dict(saved)
    other.retain_step(gradients(rng, parameters))
    assert torch.equal(saved["state"][0]["momentum_buffer"], kept)


@pytest.mark.parametrize(
    "saved, message",
    [
        ({"rule": "adam"}, "saved with rule='adam' and the optimizer has 'momentum'"),
        ({"slow_freq": 2}, "saved with slow_freq=2 and the optimizer has 1"),
        ({"dual_state": True}, "saved with dual_state=True"),
        ({"mask_scope": "all"}, "saved with mask_scope='all'"),
    ],
    ids=str,
)
def test_the_state_of_another_optimizer_is_refused(saved: dict[str, Any], message: str, rng: torch.Generator) -> None:
    parameters = named()
    other = UnlearnOptimizer(parameters, **{"rule": "momentum", **HYPER, **saved, "lr": 0.7})
    other.retain_step(gradients(rng, parameters))
    optimizer = UnlearnOptimizer(named(), rule="momentum", **HYPER)
    with pytest.raises(InputError, match=message):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == HYPER["lr"] and not optimizer.state


def test_a_state_that_does_not_fit_loads_nothing(rng: torch.Generator) -> None:
    parameters, optimizer = named(), UnlearnOptimizer(named(), rule="momentum", **HYPER)
    reshaped = named(shapes=(*SHAPES[:3], (3, 4, 2, 2)))
    for rule, own, message in (
        ("adam", parameters, "the state of layer0.weight holds exp_avg, and the optimizer keeps none"),
        ("momentum", reshaped, "momentum_buffer of layer3.weight has shape"),
        ("momentum", parameters[:3], r"groups of \[3\] parameters and the optimizer has \[4\]"),
    ):
        other = UnlearnOptimizer(own, **{"rule": rule, **HYPER, "lr": 0.7})
        other.retain_step(gradients(rng, own))
        state = other.state_dict()
        del state["settings"]  # as utilities that know torch.optim's two parts hand it on
        with pytest.raises(InputError, match=message):
            optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == HYPER["lr"] and not optimizer.state


FORM = "state_dict: expected what an optimizer's state_dict\\(\\) gives"


@pytest.mark.parametrize(
    "changes, message",
    [
        (None, f"{FORM}, got None"),
        ({"param_groups": None}, f"{FORM}, got something of another form"),
        ({"param_groups": [{"lr": 0.1}]}, f"{FORM}, got something"),
        ({"state": {0: 5}}, f"{FORM}, got something"),
        ({"settings": 5}, f"{FORM}, got something"),
        ({"state": {0: {"exp_avg": None}}}, "the state exp_avg of layer0.weight is None: load what state_dict"),
        ({"state": {0: {"step": "a"}}}, "the state step of layer0.weight is 'a': load what state_dict"),
        (
            {"param_groups": [{"params": [0, 1, 2, 3], "lr": float("nan")}]},
            "lr: expected a finite number from 0, got nan",
        ),
        ({"param_groups": [{"params": [0, 1, 2, 3], "betas": "ab"}]}, "betas: expected two numbers"),
    ],
)
def test_what_is_no_state_loads_nothing(changes: Any, message: str, rng: torch.Generator) -> None:
    parameters = named()
    optimizer = UnlearnOptimizer(parameters, rule="adam", lr=0.3)
    optimizer.retain_step(gradients(rng, parameters))
    saved, before = optimizer.state_dict(), snapshot(optimizer)
    with pytest.raises(InputError, match=f"^{message}"):
        optimizer.load_state_dict(None if changes is None else saved | changes)
    assert_same_bits(snapshot(optimizer), before)
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_a_group_added_later_joins_the_round_under_way() -> None:
    a, b = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    optimizer = UnlearnOptimizer([a], rule="sgd", lr=1.0, slow_rate=0.5, slow_freq=2)
    one = torch.ones(1, dtype=torch.float64)
    optimizer.retain_step([one])
    optimizer.add_param_group({"params": [b]})
    assert [group["retain_steps"] for group in optimizer.param_groups] == [1, 1]
    optimizer.retain_step([one, one])
    assert (a.item(), b.item()) == (0.0, 0.5)  # 1 -> -1 -> half way back; 1 -> 0 -> half way back


def test_copies_and_pickles_go_on_alike(rng: torch.Generator) -> None:
    model = torch.nn.Linear(5, 3)
    mask = SaliencyMask.from_dict({name: coin(rng, p.shape) for name, p in model.named_parameters()})
    optimizer = UnlearnOptimizer(model.named_parameters(), rule="adam", lr=0.1, mask=mask, max_norm=1.0, slow_rate=0.5)
    torch.optim.lr_scheduler.StepLR(optimizer, 2)  # patches `step`, and must not stand in the way
    optimizer.forget_step([torch.ones_like(p) for p in model.parameters()])
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        for one in (optimizer, twin):
            parameters = [p for group in one.param_groups for p in group["params"]]
            before = [p.detach().clone() for p in parameters]
            one.joint_step([torch.ones_like(p) for p in parameters], [-torch.ones_like(p) for p in parameters])
            moved = [(p.detach() - b).abs().max() for p, b in zip(parameters, before, strict=True)]
            assert all(step > 0 for step in moved)


def test_a_group_added_later_rounds_stochastically_too() -> None:
    weights = [torch.full((4096,), 1.0, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    optimizer = UnlearnOptimizer(weights[:1], rule="sgd", lr=1e-3, stochastic_rounding=True)
    optimizer.add_param_group({"params": weights[1:]})
    optimizer.retain_step([torch.ones_like(w) for w in weights])
    assert all(not torch.equal(w.detach(), torch.ones_like(w)) for w in weights)
    assert not torch.equal(weights[0].detach(), weights[1].detach())
