"""UnlearnOptimizer's steps: torch.optim, hand numbers, a plain float64 transcription, absent gradients, rounding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.layouts import RULES, same_bits
from helpers.optimizers import (
    HYPER,
    WITHOUT_MOMENTUM,
    Grads,
    Plain,
    assert_follows,
    assert_same_bits,
    gradients,
    masks_of,
    named,
    snapshot,
    values,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unlearn_ext.errors import InputError
from unlearn_ext.optim import UnlearnOptimizer
from unlearn_ext.saliency import SaliencyMask

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
