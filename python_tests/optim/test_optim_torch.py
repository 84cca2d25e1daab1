"""UnlearnOptimizer among the rest of torch: schedulers, scalers, hooks, autograd, threads."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from helpers.layouts import same_bits
from helpers.optimizers import HYPER, assert_same_bits, gradients, masks_of, named, snapshot
from torch import nn

from unlearn_ext.optim import UnlearnOptimizer
from unlearn_ext.saliency import SaliencyMask


@pytest.mark.parametrize("step", ("forget_step", "retain_step", "joint_step", "step"))
def test_schedulers_do_not_warn(step: str) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = UnlearnOptimizer([p], rule="sgd", lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        p.grad = torch.ones(3)
        getattr(optimizer, step)(*[[torch.ones(3)]] if step == "joint_step" else [])
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * (1 + math.cos(math.pi / 4)) / 2)


def test_a_scheduler_before_any_step_still_warns() -> None:
    optimizer = UnlearnOptimizer([nn.Parameter(torch.ones(3))], rule="sgd", lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


@pytest.mark.parametrize("dual", (False, True))
def test_forget_lr_follows_the_scheduler(dual: bool) -> None:
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = UnlearnOptimizer([p], rule="sgd", lr=0.5, forget_lr=0.125, dual_state=dual)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    one, moves = [torch.ones(1, dtype=torch.float64)], []
    for _ in range(3):
        for step in (optimizer.forget_step, optimizer.retain_step):
            before = p.item()
            step(one)
            moves.append(before - p.item())
        scheduler.step()
    assert moves == [0.125, 0.5, 0.0625, 0.25, 0.03125, 0.125]


def test_dual_state_keeps_separate_moments(rng: torch.Generator) -> None:
    parameters = named()
    options = {"dual_state": True, "forget_rule": "adam"}
    optimizer = UnlearnOptimizer(parameters, rule="momentum", **options, **HYPER)
    optimizer.retain_step(gradients(rng, parameters))
    p = parameters[0][1]
    retain = optimizer.state[p]["momentum_buffer"].clone()
    optimizer.forget_step(gradients(rng, parameters))
    assert same_bits(retain, optimizer.state[p]["momentum_buffer"])
    moments = {"forget_exp_avg", "forget_exp_avg_sq"}
    assert set(optimizer.state[p]) == {"step", "momentum_buffer", "forget_step"} | moments
    forget = {name: optimizer.state[p][name].clone() for name in moments}
    optimizer.joint_step(gradients(rng, parameters), gradients(rng, parameters))
    assert all(same_bits(forget[name], optimizer.state[p][name]) for name in moments)
    assert (optimizer.state[p]["step"], optimizer.state[p]["forget_step"]) == (2, 1)


def test_grad_scaler() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    twin = copy.deepcopy(model)
    x = torch.randn(5, 4)
    for own, optimizer in (
        (model, UnlearnOptimizer(model.named_parameters(), rule="momentum", lr=0.1, momentum=0.9)),
        (twin, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)),
    ):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        for spoil in (False, True, False):
            optimizer.zero_grad()
            scaler.scale(own(x).square().mean()).backward()
            if spoil:
                own.bias.grad[1] = math.inf
            before = own.weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, own.weight) == spoil
        assert scaler.get_scale() == 512.0
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_step_hooks_fire_once_for_every_kind_of_step() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = UnlearnOptimizer([p], rule="sgd", lr=0.1)
    p.grad = torch.ones(3)
    seen: list[tuple[str, float]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(("before", p[0].item())))
    optimizer.register_step_post_hook(lambda *_: seen.append(("after", p[0].item())))
    for step in (
        optimizer.step,
        optimizer.forget_step,
        optimizer.retain_step,
        lambda: optimizer.joint_step([torch.zeros(3)]),
    ):
        seen.clear()
        step()
        assert [when for when, _ in seen] == ["before", "after"] and seen[0][1] > seen[1][1]


def test_version_counters() -> None:
    parameters = named()
    optimizer = UnlearnOptimizer(parameters, rule="adamw", slow_rate=0.5, **HYPER)
    rng = torch.Generator().manual_seed(0)
    optimizer.forget_step(gradients(rng, parameters))
    for step in (optimizer.forget_step, optimizer.retain_step):
        before = [p._version for _, p in parameters]
        step(gradients(rng, parameters))
        assert all(p._version > old for (_, p), old in zip(parameters, before, strict=True))
    p = parameters[0][1]
    loss = (p * p).sum()
    optimizer.forget_step(gradients(rng, parameters))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_same_bits_for_every_number_of_threads() -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            parameters = named(torch.float32, ((70001,), (300, 100), (3,)))
            mask = SaliencyMask.from_dict(masks_of(parameters))
            options = {"max_norm": 1.0, "retain_max_norm": 1.0, "slow_rate": 0.5}
            optimizer = UnlearnOptimizer(parameters, rule="adamw", mask=mask, **options, **HYPER)
            rng = torch.Generator().manual_seed(0)
            for _ in range(2):
                optimizer.forget_step(gradients(rng, parameters))
                optimizer.retain_step(gradients(rng, parameters))
                optimizer.joint_step(gradients(rng, parameters), gradients(rng, parameters))
            results.append(snapshot(optimizer))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(*results)
