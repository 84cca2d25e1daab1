"""UnlearnOptimizer's steps are the same bits in whatever state the process is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.optimizers import HYPER, assert_same_bits, gradients, masks_of, named, snapshot
from helpers.process_state import STATES, Around
from torch import Tensor, nn

from unlearn_ext.errors import InputError
from unlearn_ext.optim import UnlearnOptimizer
from unlearn_ext.saliency import SaliencyMask

OPTIONS: dict[str, dict[str, Any]] = {
    "momentum": {"rule": "momentum", "slow_rate": 0.5, "slow_freq": 2, "max_norm": 1.0, "project": True},
    "adamw": {"rule": "adamw", "retain_max_norm": 1.0, "dual_state": True, "forget_rule": "momentum"},
    "rounding": {"rule": "adam", "stochastic_rounding": True, "protect": True},
}


def build(options: dict[str, Any], rng: torch.Generator) -> tuple[UnlearnOptimizer, list[list[Tensor]]]:
    parameters = named(torch.bfloat16 if options.get("stochastic_rounding") else torch.float32)
    grads = [gradients(rng, parameters) for _ in range(6)]
    mask = SaliencyMask.from_dict(masks_of(parameters))
    torch.manual_seed(0)
    return UnlearnOptimizer(parameters, mask=mask, **{**HYPER, **options}), grads


def run(optimizer: UnlearnOptimizer, grads: list[list[Tensor]]) -> None:
    optimizer.forget_step(grads[0])
    optimizer.retain_step(grads[1])
    optimizer.joint_step(grads[2], grads[3])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for (_, p), gradient in zip(optimizer.named_parameters(), grads[4], strict=True):
        p.grad = gradient
    optimizer.step()


@pytest.mark.parametrize("around", STATES.values(), ids=STATES.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_steps_do_not_depend_on_the_process(options: dict[str, Any], around: Around) -> None:
    plain, grads = build(options, torch.Generator().manual_seed(0))
    run(plain, grads)
    other, grads = build(options, torch.Generator().manual_seed(0))
    with around():
        run(other, grads)
    assert_same_bits(snapshot(plain), snapshot(other))
    for optimizer in (plain, other):  # and goes on outside
        optimizer.retain_step(grads[5])
        assert optimizer.last_clip.device.type == "cpu" and optimizer.last_clip.dtype == torch.float64
    assert_same_bits(snapshot(plain), snapshot(other))


@pytest.mark.parametrize("name", ("float64 by default", "meta by default", "inference mode"))
def test_an_optimizer_may_be_built_there(name: str) -> None:
    rng = torch.Generator().manual_seed(0)
    plain, grads = build(OPTIONS["rounding"], rng)
    parameters = named(torch.bfloat16)
    mask = SaliencyMask.from_dict(masks_of(parameters))
    torch.manual_seed(0)
    with STATES[name]():
        other = UnlearnOptimizer(parameters, mask=mask, **{**HYPER, **OPTIONS["rounding"]})
    run(plain, grads)
    run(other, grads)
    assert_same_bits(snapshot(plain), snapshot(other))


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode), ids=("no_grad", "inference mode"))
def test_a_closure_records_in_any_mode(mode) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = UnlearnOptimizer([p], rule="sgd", lr=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    with mode():
        assert optimizer.step(closure).item() == 3.0
    assert torch.equal(p.detach(), torch.full((3,), 0.5))


@pytest.mark.parametrize("side", ("forget", "retain"))
@pytest.mark.parametrize("name", ("float64 by default", "meta by default", "deterministic"))
def test_a_step_in_backward_does_not_depend_on_the_process(name: str, side: str) -> None:
    results = []
    for around in (torch.enable_grad, STATES[name]):
        (p,) = parameters = [nn.Parameter(torch.linspace(-1, 1, 6))]
        optimizer = UnlearnOptimizer(parameters, rule="adam", lr=0.1, max_norm=0.5, retain_max_norm=0.5)
        loss = p.square().sum()
        with around():
            with optimizer.norm_in_backward(side):
                loss.backward(retain_graph=True)
            with optimizer.step_in_backward(side):
                loss.backward()
        results.append(snapshot(optimizer))
    assert_same_bits(*results)


def test_a_parameter_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        p = nn.Parameter(torch.ones(2))
    with pytest.raises(InputError, match=r"^the parameter head\.weight was made in inference mode"):
        UnlearnOptimizer([("head.weight", p)], rule="sgd", lr=0.1)


def test_parameters_on_the_meta_device_may_wait_for_their_weights() -> None:
    model = nn.Linear(3, 2, device="meta")
    assert len(UnlearnOptimizer(model.named_parameters(), rule="adam", lr=0.1).param_groups[0]["params"]) == 2
