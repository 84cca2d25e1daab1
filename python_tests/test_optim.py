"""UnlearnOptimizer: torch.optim, a plain float64 transcription, state, schedulers, scalers, refusals."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from conftest import RULES, coin, normal, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unlearn_ext.errors import InputError, NonFiniteError
from unlearn_ext.optim import StepConfig, UnlearnOptimizer
from unlearn_ext.saliency import SaliencyMask
from unlearn_ext.saliency.protection import protected_hashes

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


# --- torch.optim --------------------------------------------------------------------------------------------


def torch_optimizer(rule: str, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    common = {"lr": HYPER["lr"], "weight_decay": HYPER["weight_decay"]}
    if rule in ("sgd", "momentum"):
        return torch.optim.SGD(parameters, momentum=HYPER["momentum"] if rule == "momentum" else 0.0, **common)
    maker = torch.optim.Adam if rule == "adam" else torch.optim.AdamW
    return maker(parameters, betas=HYPER["betas"], eps=HYPER["eps"], **common)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_retain_steps_are_torch_optims(rule: str, dtype: torch.dtype, tolerance: float, rng: torch.Generator) -> None:
    parameters, others = named(dtype), named(dtype)
    hyper = WITHOUT_MOMENTUM if rule == "sgd" else HYPER
    optimizer = UnlearnOptimizer([p for _, p in parameters], rule=rule, **hyper)
    other = torch_optimizer(rule, [p for _, p in others])
    for t in range(10):
        found = gradients(rng, parameters)
        for (_, p), g in zip(others, found, strict=True):
            p.grad = g.clone()
        other.step()
        if t % 2:
            optimizer.retain_step(found)
        else:
            for (_, p), g in zip(parameters, found, strict=True):
                p.grad = g.clone()
            optimizer.step()
            assert all(torch.equal(p.grad, g) for (_, p), g in zip(parameters, found, strict=True))
    for (_, p), (_, q) in zip(parameters, others, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def test_step_returns_the_closures_loss() -> None:
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = UnlearnOptimizer([p], rule="sgd", lr=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert p.item() == 0.0


# --- Hand-computed ------------------------------------------------------------------------------------------


def test_clip_by_the_masked_weighted_norm() -> None:
    # Kept of the forget gradient: (3, 0, 4) of norm 5, weighted 10, so clip = 2 / (10 + 1e-6). The masked-out 100
    # counts nowhere. Weight decay: 0.1·(1, 1, 1, 1), the masked-out weight's too.
    p = nn.Parameter(torch.ones(4, dtype=torch.float64))
    mask = SaliencyMask.from_dict({"w": torch.tensor([True, False, True, True])})
    options = {"rule": "sgd", "lr": 0.5, "weight_decay": 0.1, "forget_weight": 2.0, "max_norm": 2.0}
    optimizer = UnlearnOptimizer([("w", p)], mask=mask, **options)
    optimizer.forget_step([torch.tensor([3.0, 100.0, 0.0, 4.0], dtype=torch.float64)])
    clip = 2 / (10 + 1e-6)
    want = [1 - 0.5 * (2 * clip * g + 0.1) for g in (3.0, 0.0, 0.0, 4.0)]
    assert p.tolist() == pytest.approx(want, rel=1e-15)
    assert optimizer.last_clip.item() == pytest.approx(clip, rel=1e-15)


def test_a_small_gradient_is_not_clipped() -> None:
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = UnlearnOptimizer([p], rule="sgd", lr=1.0, max_norm=5.1, retain_max_norm=1.0)
    optimizer.forget_step([torch.tensor([3.0, 4.0], dtype=torch.float64)])
    assert p.tolist() == [-3.0, -4.0] and optimizer.last_clip == 1.0
    optimizer.retain_step([torch.tensor([3.0, 4.0], dtype=torch.float64)])
    assert p.tolist() == pytest.approx([-3 - 3 / (5 + 1e-6), -4 - 4 / (5 + 1e-6)], rel=1e-15)


def test_groups_have_rates_and_weights_of_their_own() -> None:
    a, b = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    groups = [
        {"params": [("a", a)], "lr": 0.1, "forget_weight": 2.0},
        {"params": [("b", b)], "retain_weight": 3.0},
    ]
    optimizer = UnlearnOptimizer(groups, rule="sgd", lr=0.01, max_norm=1.0)
    one = torch.ones(1, dtype=torch.float64)
    optimizer.forget_step([3 * one, 8 * one])
    clip = 1 / (10 + 1e-6)  # of (2·3, 1·8)
    assert (a.item(), b.item()) == pytest.approx((-0.1 * 6 * clip, -0.01 * 8 * clip), rel=1e-15)
    before = a.item(), b.item()
    optimizer.retain_step([one, one])
    assert (a.item() - before[0], b.item() - before[1]) == pytest.approx((-0.1, -0.03), rel=1e-12)


def test_slow_weights_by_hand() -> None:
    # θ: 1 → 0 (forget) → -1 (retain) → -2 (retain, closes) = 1 + 0.25·(-2 - 1) = 0.25.
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = UnlearnOptimizer([p], rule="sgd", lr=1.0, slow_rate=0.25, slow_freq=2)
    one = [torch.ones(1, dtype=torch.float64)]
    path = []
    for step in (optimizer.forget_step, optimizer.retain_step, optimizer.retain_step, optimizer.forget_step):
        step(one)
        path.append((p.item(), optimizer.state[p]["slow"].item()))
    assert path == [(0.0, 1.0), (-1.0, 1.0), (0.25, 0.25), (-0.75, 0.25)]


def test_what_only_a_forget_step_moved_is_interpolated() -> None:
    a, b = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    optimizer = UnlearnOptimizer([a, b], rule="momentum", lr=1.0, momentum=0.5, weight_decay=0.5, slow_rate=0.25)
    one = torch.ones(1, dtype=torch.float64)
    optimizer.forget_step([None, one])
    assert b.item() == 1 - 1.5
    state = {k: v for k, v in optimizer.state[b].items() if k != "slow"}
    optimizer.retain_step([one, None])
    assert b.item() == optimizer.state[b]["slow"].item() == 1 + 0.25 * (-0.5 - 1)
    assert {k: v for k, v in optimizer.state[b].items() if k != "slow"} == state, "no step, no momentum, no decay"


def test_a_full_slow_rate_keeps_no_copy() -> None:
    parameters = named()
    optimizer = UnlearnOptimizer(parameters, rule="adam", lr=0.1, slow_freq=2)
    rng = torch.Generator().manual_seed(0)
    for _ in range(3):
        optimizer.forget_step(gradients(rng, parameters))
        optimizer.retain_step(gradients(rng, parameters))
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in optimizer.state.values())


# --- Against the transcription ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "sgd", "max_norm": 0.5},
        {"rule": "momentum", "slow_rate": 0.3, "slow_freq": 2, "retain_max_norm": 0.7},
        {"rule": "adam", "max_norm": 1.0, "retain_max_norm": 2.0, "forget_weight": 1.7, "retain_weight": 0.6},
        {"rule": "adamw", "protect": True, "slow_rate": 0.5},
        {"rule": "adamw", "protect": True, "mask_scope": "all", "slow_rate": 0.5, "retain_max_norm": 1.0},
        {"rule": "momentum", "mask_scope": "all"},
        {"rule": "momentum", "dual_state": True, "forget_rule": "adam", "forget_lr": 0.002},
        {"rule": "adamw", "dual_state": True, "slow_rate": 0.5, "slow_freq": 3, "protect": True},
        {"rule": "adam", "forget_lr": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", (False, True), ids=("unmasked", "masked"))
@settings(max_examples=20)
@given(data=st.data())
def test_any_sequence_of_steps(options: dict[str, Any], masked: bool, data: st.DataObject) -> None:
    """Absent gradients skip their tensor: its bias corrections count its own steps only."""
    if not masked:
        options = {k: v for k, v in options.items() if k not in ("protect", "mask_scope")}
    draw = data.draw
    parameters = named()
    masks = masks_of(parameters) if masked else None
    mask = SaliencyMask.from_dict(masks) if masked else None
    hyper = WITHOUT_MOMENTUM if options["rule"] == "sgd" else HYPER
    optimizer = UnlearnOptimizer(parameters, mask=mask, **{**hyper, **options})
    plain = Plain(values(parameters), list(masks.values()) if masked else None, **options)
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def some() -> Grads:
        present = draw(st.lists(st.booleans(), min_size=4, max_size=4).filter(any))
        return [g if is_there else None for g, is_there in zip(gradients(rng, parameters), present, strict=True)]

    for op in draw(st.lists(st.sampled_from(("forget", "retain", "joint")), min_size=1, max_size=6)):
        forget, retain = (some() if op in (part, "joint") else None for part in ("forget", "retain"))
        plain.step(op, forget, retain)
        if op == "joint":
            optimizer.joint_step(forget, retain)
        else:
            getattr(optimizer, f"{op}_step")(forget or retain)
        assert_follows(parameters, plain)
        if op != "retain":
            assert float(optimizer.last_clip) == pytest.approx(plain.clip, rel=1e-12)


def test_joint_step_takes_retain_gradients_from_the_parameters(rng: torch.Generator) -> None:
    parameters = named()
    plain = Plain(values(parameters), None, rule="momentum")
    optimizer = UnlearnOptimizer(parameters, rule="momentum", **HYPER)
    forget, retain = gradients(rng, parameters), gradients(rng, parameters)
    for (_, p), g in zip(parameters, retain, strict=True):
        p.grad = g
    optimizer.joint_step(forget)
    plain.step("joint", forget, retain)
    assert_follows(parameters, plain)


# --- Absent gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_a_parameter_without_gradient_is_left_alone(rule: str, rng: torch.Generator) -> None:
    parameters = named()
    optimizer = UnlearnOptimizer(parameters, rule=rule, **(WITHOUT_MOMENTUM if rule == "sgd" else HYPER))
    optimizer.retain_step(gradients(rng, parameters))
    before = snapshot(optimizer)
    for step in (optimizer.forget_step, optimizer.retain_step):
        step([None, *gradients(rng, parameters)[1:]])
    after = snapshot(optimizer)
    own = [name for name in before if name.split()[0] == "0"]
    assert_same_bits({name: before[name] for name in own}, {name: after[name] for name in own})
    first, second = (optimizer.state[p]["step"] for _, p in parameters[:2])
    assert (int(first), int(second)) == (1, 3)


def test_all_gradients_absent(rng: torch.Generator) -> None:
    parameters = named()
    optimizer = UnlearnOptimizer(parameters, rule="sgd", lr=0.1)
    nothing = [None] * len(parameters)
    for name, call in {
        "forget_step": optimizer.forget_step,
        "retain_step": optimizer.retain_step,
        "joint_step": lambda: optimizer.joint_step(nothing, nothing),
    }.items():
        with pytest.raises(InputError, match=rf"^{name}: every gradient is None; call backward\(\)"):
            call()
    with pytest.raises(InputError, match="every gradient is None"):
        optimizer.step()


def test_frozen_parameters(rng: torch.Generator) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    frozen = copy.deepcopy(model[0].state_dict())
    optimizer = UnlearnOptimizer(model.named_parameters(), rule="adamw", lr=0.1, weight_decay=0.1)
    start = model[1].weight.detach().clone()
    for step in (optimizer.forget_step, optimizer.step):
        model(torch.ones(2, 3)).sum().backward()
        step()
    assert all(same_bits(frozen[name], value) for name, value in model[0].state_dict().items())
    assert not torch.equal(start, model[1].weight)


@pytest.mark.parametrize("protect", [False, True])
def test_a_mask_without_frozen_parameters(protect: bool) -> None:
    """As it is measured: an optimizer over all parameters takes it, frozen ones with and without bits alike."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    frozen = copy.deepcopy(model[0].state_dict())
    keep = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters() if p.requires_grad}
    options = {"rule": "adamw", "lr": 0.1, "weight_decay": 0.1, "max_norm": 1.0, "slow_rate": 0.5, "slow_freq": 2}
    options |= {"mask_scope": "all", "protect": protect}
    results = []
    for masks in (keep, {**keep, "0.weight": torch.ones(4, 3, dtype=torch.bool)}):
        own = copy.deepcopy(model)
        optimizer = UnlearnOptimizer(own.named_parameters(), mask=SaliencyMask.from_dict(masks), **options)
        for _ in range(2):
            for step in (optimizer.forget_step, optimizer.step):
                optimizer.zero_grad()
                own(torch.ones(2, 3)).sum().backward()
                step()
        assert all(same_bits(frozen[name], value) for name, value in own[0].state_dict().items())
        assert not torch.equal(own[1].weight, model[1].weight)
        results.append(values(list(own.named_parameters())))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


# --- Masks and protection -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("scope", ("forget", "all"))
def test_protected_weights_keep_their_bits(scope: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    parameters = named(dtype)
    masks = masks_of(parameters)
    mask = SaliencyMask.from_dict(masks)
    options = {"rule": "adamw", "lr": 0.1, "weight_decay": 0.5, "slow_rate": 0.5, "mask_scope": scope}
    optimizer = UnlearnOptimizer(parameters, mask=mask, protect=True, **options)
    weights, bits = [p for _, p in parameters], mask.bind(parameters)
    start, hashes = values(parameters), protected_hashes(weights, bits)
    for _ in range(100):
        optimizer.forget_step(gradients(rng, parameters))
        if scope == "all":
            optimizer.retain_step(gradients(rng, parameters))
            optimizer.joint_step(gradients(rng, parameters), gradients(rng, parameters))
    for (name, p), old in zip(parameters, start, strict=True):
        keep = masks[name]
        assert same_bits(p.detach()[~keep], old[~keep]), name
        assert not keep.any() or not same_bits(p.detach()[keep], old[keep]), name
    assert protected_hashes(weights, bits) == hashes
    if scope == "forget":
        optimizer.retain_step(gradients(rng, parameters))
        assert protected_hashes(weights, bits) != hashes, "retain steps are not masked"


def test_without_protection_decay_moves_masked_weights() -> None:
    p = nn.Parameter(torch.ones(2))
    mask = SaliencyMask.from_dict({"w": torch.tensor([True, False])})
    UnlearnOptimizer([("w", p)], rule="adamw", lr=0.5, weight_decay=0.5, mask=mask).forget_step([torch.zeros(2)])
    assert p.tolist() == [0.75, 0.75]


def test_protection_holds_when_the_gradient_is_absent() -> None:
    """The end of a round moves tensors without gradient too, and in a masked step it has to spare the protected."""
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    mask = SaliencyMask.from_dict({name: torch.tensor([True, False]) for name in "ab"})
    options = {"rule": "sgd", "lr": 0.5, "slow_rate": 0.5, "slow_freq": 2}
    optimizer = UnlearnOptimizer([("a", a), ("b", b)], mask=mask, protect=True, **options)
    ones = torch.ones(2)
    optimizer.retain_step([ones, ones])  # not masked: 1 → 0.5
    optimizer.joint_step([ones, None], [ones, None])  # masked, closes the round
    # a: kept 0.5 - 0.5·2 = -0.5, then half way back to 1. b: kept half way from 0.5 to 1.
    assert (a.tolist(), b.tolist()) == ([0.25, 0.5], [0.75, 0.5])


def test_protected_negative_zero_survives_the_end_of_a_round() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.tensor([-0.0, 1.0]))
    mask = SaliencyMask.from_dict({"a": torch.ones(2, dtype=torch.bool), "b": torch.zeros(2, dtype=torch.bool)})
    options = {"rule": "sgd", "lr": 0.5, "slow_rate": 0.5, "mask_scope": "all", "protect": True}
    optimizer = UnlearnOptimizer([("a", a), ("b", b)], mask=mask, **options)
    before = b.detach().clone()
    optimizer.retain_step([torch.ones(2), None])
    assert same_bits(b.detach(), before)


@pytest.mark.parametrize("gradient_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("scope", ("forget", "all"))
def test_channels_last_weights(scope: str, gradient_format: torch.memory_format, rng: torch.Generator) -> None:
    """The result does not depend on how weights and gradients lie in memory, clipping by the masked norm included."""
    shapes = ((4, 3, 3, 5), (8, 4, 2, 2), (6,))
    plain, other = named(shapes=shapes), named(shapes=shapes)
    other = [(n, nn.Parameter(p.to(memory_format=torch.channels_last)) if p.dim() == 4 else p) for n, p in other]
    mask = SaliencyMask.from_dict(masks_of(plain))
    options = {"rule": "momentum", "mask": mask, "mask_scope": scope, "max_norm": 0.5, "retain_max_norm": 0.5}
    one, two = (UnlearnOptimizer(p, slow_rate=0.5, **options, **HYPER) for p in (plain, other))

    def relaid(grads: Grads) -> Grads:
        return [g.to(memory_format=gradient_format) if g.dim() == 4 else g for g in grads]

    for _ in range(3):
        forget, retain = gradients(rng, plain), gradients(rng, plain)
        one.forget_step(forget)
        two.forget_step(relaid(forget))
        torch.testing.assert_close(one.last_clip, two.last_clip, rtol=1e-14, atol=0)
        for optimizer, grads in ((one, forget), (two, relaid(forget))):
            optimizer.joint_step(grads, retain)
        one.retain_step(retain)
        two.retain_step(relaid(retain))
    for (_, p), (_, q) in zip(plain, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-14)
    assert two.state[other[0][1]]["momentum_buffer"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("wrap", (lambda m: torch.compile(m, backend="aot_eager"), nn.DataParallel), ids=("c", "dp"))
def test_a_wrapped_model_takes_the_plain_models_mask(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    twin = copy.deepcopy(model)
    mask = SaliencyMask.from_dict(masks_of(list(model.named_parameters())))
    results = []
    for own in (model, wrap(twin)):
        optimizer = UnlearnOptimizer(own.named_parameters(), rule="adamw", lr=0.01, mask=mask, max_norm=0.1)
        x = torch.linspace(-1, 1, 24).view(4, 6)
        for step in (optimizer.forget_step, optimizer.step, optimizer.forget_step):
            optimizer.zero_grad()
            own(x).square().mean().backward()
            step()
        results.append(own(x).detach())
    # The compiled graph reads the moved weights.
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1], twin(x).detach(), rtol=1e-5, atol=1e-6)


# --- Non-finite gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", (math.inf, -math.inf, math.nan))
@pytest.mark.parametrize("op", ("forget", "retain", "joint"))
def test_a_non_finite_gradient_raises_and_writes_nothing(op: str, value: float, rng: torch.Generator) -> None:
    parameters = named(torch.float32)
    masks = masks_of(parameters)
    optimizer = UnlearnOptimizer(
        parameters, mask=SaliencyMask.from_dict(masks), slow_rate=0.5, slow_freq=2, rule="adamw", **HYPER
    )
    optimizer.retain_step(gradients(rng, parameters))
    good, bad = gradients(rng, parameters), gradients(rng, parameters)
    kept = masks["layer3.weight"].nonzero()[0]
    bad[3][tuple(kept)] = value
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    part = "retain" if op == "retain" else "forget"
    with pytest.raises(NonFiniteError, match=rf"^{op}_step: the {part} gradient of layer3\.weight is not finite"):
        if op == "joint":
            optimizer.joint_step(bad, good)
        else:
            getattr(optimizer, f"{op}_step")(bad)
    assert_same_bits(before, snapshot(optimizer))
    assert optimizer.state_dict()["param_groups"] == groups
    optimizer.raise_if_non_finite()  # told already


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["forget", "retain", "joint"])
def test_a_wide_gradient_that_overflows_raises_and_writes_nothing(op: str, dtype: torch.dtype) -> None:
    """1e300 is finite in float64, in which norms are summed, and an infinity in float32, in which the step is made."""
    parameters = named(dtype)
    optimizer = UnlearnOptimizer(parameters, rule="momentum", lr=0.1, momentum=0.9)
    wide = [torch.ones(p.shape, dtype=torch.float64) for _, p in parameters]
    optimizer.retain_step(wide)
    before = snapshot(optimizer)
    wide[1][3] = 1e300
    with pytest.raises(NonFiniteError, match=r"gradient of layer1\.weight is not finite and no weight was changed"):
        optimizer.joint_step(wide, wide) if op == "joint" else getattr(optimizer, f"{op}_step")(wide)
    assert_same_bits(before, snapshot(optimizer))


def test_a_wide_gradient_is_rounded_as_its_weight_is() -> None:
    weight = nn.Parameter(torch.zeros(6, 5, 3, 3).to(memory_format=torch.channels_last))
    rng = torch.Generator().manual_seed(4)
    gradient = normal(rng, weight.shape, torch.float64)
    UnlearnOptimizer([("w", weight)], rule="sgd", lr=1.0).retain_step([gradient])
    assert torch.equal(weight, -gradient.float())


def test_a_masked_out_infinity_is_no_error(rng: torch.Generator) -> None:
    parameters = named()
    masks = masks_of(parameters)
    clean = gradients(rng, parameters)
    dirty = [torch.where(masks[name], g, math.inf) for (name, _), g in zip(parameters, clean, strict=True)]
    results = []
    for grads in (clean, dirty):
        own = named()
        optimizer = UnlearnOptimizer(own, rule="adam", max_norm=0.3, mask=SaliencyMask.from_dict(masks), **HYPER)
        optimizer.forget_step(grads)
        results.append(snapshot(optimizer))
    assert_same_bits(*results)
    with pytest.raises(NonFiniteError, match=r"the retain gradient of layer0\.weight"):
        optimizer.retain_step(dirty)


def test_unnamed_parameters_are_told_by_number() -> None:
    optimizer = UnlearnOptimizer([nn.Parameter(torch.ones(2)) for _ in range(3)], rule="sgd", lr=0.1)
    with pytest.raises(NonFiniteError, match="gradient of parameter 2 is not finite"):
        optimizer.forget_step([torch.ones(2), None, torch.tensor([0.0, math.nan])])


def test_a_skipped_step_does_not_end_the_round(monkeypatch) -> None:
    """Where the host does not wait to know that a gradient is not finite, the whole step has to write nothing."""
    monkeypatch.setattr(UnlearnOptimizer, "_raise_non_finite", lambda *_: None)
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = UnlearnOptimizer([a, b], rule="momentum", lr=0.5, momentum=0.5, slow_rate=0.5, slow_freq=2)
    optimizer.retain_step([torch.ones(2), torch.ones(2)])
    before = {name: value for name, value in snapshot(optimizer).items() if "step" not in name}
    optimizer.retain_step([torch.full((2,), math.inf), None])
    after = snapshot(optimizer)
    assert_same_bits(before, {name: after[name] for name in before})


# --- Schedulers, scalers, autograd --------------------------------------------------------------------------


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


# --- Stochastic rounding ------------------------------------------------------------------------------------


def tiny_steps(stochastic: bool, seed: int = 0) -> Tensor:
    """16 steps of 2^-13 up from 1.5, where the next bfloat16 is 2^-7 away: half an ulp is 32 steps."""
    torch.manual_seed(seed)
    p = nn.Parameter(torch.full((20000,), 1.5, dtype=torch.bfloat16))
    optimizer = UnlearnOptimizer([p], rule="sgd", lr=2.0**-13, stochastic_rounding=stochastic)
    for t in range(16):
        (optimizer.forget_step if t % 2 else optimizer.retain_step)([torch.full(p.shape, -1.0, dtype=torch.bfloat16)])
    return p.detach().double()


def test_stochastic_rounding_moves_on_average() -> None:
    moved = tiny_steps(True) - 1.5
    error = moved.std() / len(moved) ** 0.5
    assert abs(moved.mean() - 16 * 2.0**-13) < 3 * error
    assert error < 2.0**-13, "too few weights to tell"
    assert torch.equal(tiny_steps(False), torch.full_like(moved, 1.5)), "rounding to nearest loses every step"


def test_stochastic_rounding_is_repeatable() -> None:
    first = tiny_steps(True)
    assert torch.equal(first, tiny_steps(True))
    assert not torch.equal(first, tiny_steps(True, seed=1))


def test_groups_round_independently() -> None:
    a, b = (nn.Parameter(torch.full((5000,), 1.5, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = UnlearnOptimizer([{"params": [a]}, {"params": [b]}], rule="sgd", lr=2.0**-8, stochastic_rounding=True)
    optimizer.retain_step([torch.ones_like(a), torch.ones_like(b)])
    assert not torch.equal(a, b)


# --- state_dict ---------------------------------------------------------------------------------------------

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


def test_a_group_added_later_joins_the_round_under_way() -> None:
    a, b = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    optimizer = UnlearnOptimizer([a], rule="sgd", lr=1.0, slow_rate=0.5, slow_freq=2)
    one = torch.ones(1, dtype=torch.float64)
    optimizer.retain_step([one])
    optimizer.add_param_group({"params": [b]})
    assert [group["retain_steps"] for group in optimizer.param_groups] == [1, 1]
    optimizer.retain_step([one, one])
    assert (a.item(), b.item()) == (0.0, 0.5)  # 1 -> -1 -> half way back; 1 -> 0 -> half way back


# --- Refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rule": "lion"}, "rule: expected one of sgd, momentum, adam, adamw, got 'lion'"),
        ({"forget_rule": "lion", "dual_state": True}, "forget_rule: expected one of"),
        ({"forget_rule": "adam"}, "forget_rule needs a state of its own: set dual_state=True"),
        ({"mask_scope": "retain"}, "mask_scope: expected one of forget, all, got 'retain'"),
        ({"slow_freq": 0}, "slow_freq: expected an integer from 1, got 0"),
        ({"slow_freq": 1.5}, "slow_freq: expected an integer from 1, got 1.5"),
        ({"slow_freq": True}, "slow_freq: expected an integer from 1, got True"),
        ({"slow_rate": 0.0}, r"slow_rate: expected a rate in \(0, 1\], got 0.0"),
        ({"slow_rate": 1.5}, "slow_rate: expected"),
        ({"lr": -1.0}, "lr: expected a finite number from 0, got -1.0"),
        ({"lr": math.nan}, "lr: expected a finite number from 0, got nan"),
        ({"lr": math.inf}, "lr: expected a finite number from 0, got inf"),
        ({"lr": "a"}, "lr: expected a finite number from 0, got 'a'"),
        ({"lr": None}, "lr: expected a finite number from 0, got None"),
        ({"forget_weight": math.nan}, "forget_weight: expected a finite number, got nan"),
        ({"retain_weight": math.inf}, "retain_weight: expected a finite number, got inf"),
        ({"rule": "momentum", "momentum": 1.5}, r"momentum: expected a number in \[0, 1\), got 1.5"),
        ({"forget_lr": -1.0}, "forget_lr: expected a finite number from 0"),
        ({"momentum": -0.1}, r"momentum: expected a number in \[0, 1\)"),
        ({"eps": -1e-8}, "eps: expected a finite number from 0"),
        ({"weight_decay": -0.1}, "weight_decay: expected a finite number from 0"),
        ({"max_norm": 0.0}, "max_norm: expected more than 0, or None for no clipping, got 0.0"),
        ({"retain_max_norm": math.nan}, "retain_max_norm: expected more than 0"),
        ({"betas": (0.9, 1.0)}, r"betas: expected two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, "betas: expected two numbers"),
        ({"betas": 0.9}, "betas: expected two numbers"),
        ({"betas": (0.9, "b")}, "betas: expected two numbers"),
        ({"max_norm": "a"}, "max_norm: expected more than 0, or None for no clipping, got 'a'"),
        ({"protect": True}, "protect=True needs a mask"),
        ({"momentum": 0.9}, "momentum=0.9 does nothing under rule='sgd': set rule='momentum'"),
        ({"rule": "adam", "momentum": 0.9, "dual_state": True, "forget_rule": "sgd"}, "momentum=0.9 does nothing"),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}") as caught:
        UnlearnOptimizer(named(), **{"rule": "sgd", "lr": 0.1, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "group, message",
    [
        ({"max_norm": 1e-3}, "max_norm is no setting of a parameter group: a group takes lr, momentum, "),
        ({"rule": "adam"}, "rule is no setting of a parameter group"),
        ({"learning_rate": 0.1}, "learning_rate is no setting of a parameter group"),
        ({"lr": -1.0}, "lr: expected a finite number from 0, got -1.0"),
        ({"lr": "a"}, "lr: expected a finite number from 0, got 'a'"),
        ({"momentum": 0.9}, "momentum=0.9 does nothing under rule='sgd'"),
        ({"slow_rate": 2.0}, "slow_rate: expected a rate"),
        ({"betas": (0.9,)}, "betas: expected two numbers"),
    ],
    ids=str,
)
def test_bad_parameter_groups(group: dict[str, Any], message: str) -> None:
    parameters = named()
    with pytest.raises(InputError, match=f"^{message}"):
        UnlearnOptimizer([{"params": parameters[:2]}, {"params": parameters[2:], **group}], rule="sgd", lr=0.1)


def test_parameters_that_share_memory() -> None:
    buffer = torch.zeros(6)
    parameters = [("a", nn.Parameter(buffer[:4])), ("b", nn.Parameter(buffer[2:]))]
    with pytest.raises(InputError, match=r"parameters\[1\].*clone\(\) one, or make both the same Parameter$"):
        UnlearnOptimizer(parameters, rule="sgd", lr=0.1)


def test_a_mask_needs_names() -> None:
    parameters = named()
    mask = SaliencyMask.from_dict(masks_of(parameters))
    with pytest.raises(InputError, match=r"pass model\.named_parameters\(\)"):
        UnlearnOptimizer([p for _, p in parameters], rule="sgd", lr=0.1, mask=mask)
    with pytest.raises(InputError, match="has no bits for other"):
        UnlearnOptimizer([*parameters, ("other", nn.Parameter(torch.ones(1)))], rule="sgd", lr=0.1, mask=mask)
    optimizer = UnlearnOptimizer(parameters, rule="sgd", lr=0.1, mask=mask)
    with pytest.raises(InputError, match="cannot join after a mask is bound"):
        optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(1)))]})


def test_a_list_of_the_wrong_length() -> None:
    optimizer = UnlearnOptimizer(named(), rule="sgd", lr=0.1)
    with pytest.raises(InputError, match=r"^forget_step: expected 4 gradients, one for each parameter, got 1$"):
        optimizer.forget_step([torch.ones(7, 5)])


def test_a_gradient_of_the_wrong_shape_writes_nothing(rng: torch.Generator) -> None:
    """Also where it belongs to the second of two groups, and the first one's operator call would succeed."""
    parameters = named()
    optimizer = UnlearnOptimizer([{"params": parameters[:2]}, {"params": parameters[2:]}], rule="adam", lr=0.1)
    optimizer.retain_step(gradients(rng, parameters))
    before = snapshot(optimizer)
    grads = gradients(rng, parameters)
    grads[3] = grads[3].reshape(3, 4, 2, 2)
    for step in (optimizer.forget_step, optimizer.retain_step):
        with pytest.raises((InputError, RuntimeError), match="shape"):
            step(grads)
        assert_same_bits(before, snapshot(optimizer))


def test_sparse_gradients_are_refused() -> None:
    layer = nn.Embedding(5, 2, sparse=True)
    optimizer = UnlearnOptimizer(layer.named_parameters(), rule="sgd", lr=0.1)
    layer(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(InputError, match=r"^retain_step: the gradient of weight is sparse; make it dense"):
        optimizer.step()


def test_the_config_holds_the_optimizers_arguments() -> None:
    """One dataclass for all methods: an argument that it forgot would be lost without a word."""
    arguments = inspect.signature(UnlearnOptimizer.__init__).parameters
    defaults = {f.name: f.default for f in dataclasses.fields(StepConfig)}
    assert list(defaults) == [n for n in arguments if n not in ("self", "params_or_named_params", "mask")]
    assert all(defaults[n] == a.default for n, a in arguments.items() if n in defaults and n not in ("rule", "lr"))
    parameters = named()
    mask = SaliencyMask.from_dict(masks_of(parameters))
    config = StepConfig(rule="adamw", lr=0.3, slow_rate=0.5, slow_freq=2, dual_state=True, forget_rule="sgd")
    optimizer = config.make_optimizer(parameters, mask)
    assert (optimizer.rule, optimizer.forget_rule, optimizer.slow_freq, optimizer.dual_state) == (
        "adamw",
        "sgd",
        2,
        True,
    )
    group = optimizer.param_groups[0]
    assert (group["lr"], group["slow_rate"]) == (0.3, 0.5)
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_the_config_is_checked_where_it_is_made() -> None:
    with pytest.raises(InputError, match="lr: expected a finite number from 0, got -1"):
        StepConfig(lr=-1.0)
    with pytest.raises(InputError, match="rule: expected one of"):
        StepConfig(rule="lion")


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
