"""step_: hand-computed numbers, torch.optim, the float64 transcription, dtypes, layouts and lists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.layouts import (
    CHANNELS_LAST,
    CONTIGUOUS,
    DTYPES,
    MISALIGNED,
    RULES,
    Arena,
    Layout,
    assert_ulps,
    coin,
    layout_cases,
    layouts_of,
    normal,
    opmath,
    same_bits,
    shapes_and_layouts,
)
from helpers.steps import FACTORS, HYPER, MOMENTS, State, assert_state, call, clone, expect, new_state
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unlearn_ext import ops

PARTS = ("forget", "retain", "both")


# --- Numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize(
    "rule, options, before, expected",
    [
        # Kept: g = 3·0.5·2 + 0.5 + 0.2·1 = 3.7, θ' = 1 - 0.1·3.7. Not kept: g = 0.5 + 0.2 = 0.7.
        ("sgd", {}, {"theta": 1.0}, {"theta": (0.63, 0.93)}),
        # As above, then 0.9 + 0.5·(θ' - 0.9).
        ("sgd", {"slow_rate": 0.5}, {"theta": 1.0, "slow": 0.9}, {"theta": (0.765, 0.915), "slow": (0.765, 0.915)}),
        # The whole gradient halved by a loss scale of 2: g = 1.5 + 0.25 + 0.2 = 1.95; 0.25 + 0.2 = 0.45.
        ("sgd", {"inverse_scale": 0.5}, {"theta": 1.0}, {"theta": (0.805, 0.955)}),
        # Scope "all": the kept one is as in the first row; the other is left with its decay, g = 0.2.
        ("sgd", {"mask_scope": "all"}, {"theta": 1.0}, {"theta": (0.63, 0.98)}),
        # Buffer: 0.9·0.5 + 3.7 = 4.15; 0.45 + 0.7 = 1.15.
        (
            "momentum",
            {"momentum": 0.9},
            {"theta": 1.0, "first": 0.5},
            {"theta": (0.585, 0.885), "first": (4.15, 1.15)},
        ),
    ],
    ids=("sgd", "sgd-slow", "sgd-scale", "sgd-scope-all", "momentum"),
)
def test_hand_computed(
    rule: str,
    options: dict[str, Any],
    before: dict[str, float],
    expected: dict[str, tuple[float, float]],
    dtype: torch.dtype,
) -> None:
    state = {name: [torch.full((2,), value, dtype=dtype)] for name, value in before.items()}
    bits = ops.pack_bits([torch.tensor([True, False])])
    forget, retain = torch.full((2,), 2.0, dtype=dtype), torch.full((2,), 0.5, dtype=dtype)
    factors = {"lr": 0.1, "weight_decay": 0.2, "forget_weight": 3.0, "forget_clip": 0.5}
    call(state, [forget], [retain], rule=rule, bits=bits, **factors, **options)
    for name, values in expected.items():
        assert_ulps(state[name][0], values, 4)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("rule, theta", [("adam", 1.92), ("adamw", 1.82)])
def test_hand_computed_adam(rule: str, theta: float, dtype: torch.dtype) -> None:
    # Second step, β1 = 0.5, β2 = 0.75, ε = 0.5; m = v = 1 before.
    # The gradient in the moments is 2: adam 1 + 0.5·2 (coupled decay), adamw 2 itself.
    # m = 0.5 + 0.5·2 = 1.5, m̂ = 1.5/(1 - 0.25) = 2;  v = 0.75 + 0.25·4 = 1.75, v̂ = 1.75/(1 - 0.5625) = 4.
    # θ: 0.1·2/(√4 + 0.5) = 0.08 off 2 for adam, off 2·(1 - 0.1·0.5) = 1.9 for adamw.
    state = {"theta": [torch.tensor([2.0], dtype=dtype)]}
    state |= {name: [torch.tensor([1.0], dtype=dtype)] for name in ("first", "second")}
    gradient = torch.tensor([1.0 if rule == "adam" else 2.0], dtype=dtype)
    options = {"lr": 0.1, "beta1": 0.5, "beta2": 0.75, "eps": 0.5, "weight_decay": 0.5, "step": 2}
    call(state, retain=[gradient], rule=rule, **options)
    for name, value in (("theta", theta), ("first", 1.5), ("second", 1.75)):
        assert_ulps(state[name][0], [value], 4)


# Of 5 steps of 6,000 weights at most this fraction may differ from torch.optim's float32 step, rounded, and
# those by one ulp: float32 errors of a few ulp decide otherwise only next to a tie.
TIES = {torch.bfloat16: 2e-4, torch.float16: 1e-3}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_matches_torch_optim(rule: str, dtype: torch.dtype, parts: str, rng: torch.Generator) -> None:
    shapes = ((), (0,), (33, 3), (6000,))
    wide = opmath(dtype)
    state = {"theta": [normal(rng, shape, dtype) for shape in shapes]}
    state |= {name: [torch.zeros(shape, dtype=wide) for shape in shapes] for name in MOMENTS[rule]}
    parameters = [theta.to(wide, copy=True).requires_grad_() for theta in state["theta"]]
    optimizer = make_optimizer(rule, parameters)
    masks = [coin(rng, shape) for shape in shapes]
    bits = ops.pack_bits(masks)
    differ = total = 0

    for t in range(1, 6):
        forget = [normal(rng, shape, dtype) for shape in shapes] if parts != "retain" else []
        retain = [normal(rng, shape, dtype) for shape in shapes] if parts != "forget" else []
        expected = expect(state, forget, retain, masks, rule=rule, step=t, **HYPER, **FACTORS)
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.zeros_like(parameter)
            if forget:
                scaled = forget[i].to(wide) * (FACTORS["forget_weight"] * FACTORS["forget_clip"])
                parameter.grad += torch.where(masks[i], scaled, 0.0)
            if retain:
                parameter.grad += retain[i].to(wide) * (FACTORS["retain_weight"] * FACTORS["retain_clip"])
        optimizer.step()
        call(state, forget, retain, rule=rule, bits=bits, step=t, **HYPER, **FACTORS)

        # Against the transcription, and against torch.optim; then both go on from torch.optim's state.
        assert_state(state, expected)
        for i, parameter in enumerate(parameters):
            reference = {"theta": parameter.detach().to(dtype), **moments_of(optimizer, parameter)}
            for name, want in reference.items():
                got = state[name][i]
                limit = 4.0 if got.dtype == wide else 1.0
                assert_ulps(got, want, limit, expected[i][f"{name}_scale"])
                if got.dtype != wide:
                    differ, total = differ + int((got != want).sum()), total + got.numel()
                got.copy_(want)
            with torch.no_grad():
                parameter.copy_(reference["theta"])
    assert differ <= TIES.get(dtype, 0.0) * total, f"{differ} of {total} weights"


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.3, 0.9), (0.5, 0.5), (0.9, 0.0)], ids=str)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("rule", ("adam", "adamw"))
def test_moments_follow_torch_optim_for_all_betas(
    rule: str, dtype: torch.dtype, betas: tuple[float, float], rng: torch.Generator
) -> None:
    """Gradients that shrink by 1e8 in one step: an interpolation from the wrong end would lose the small ones."""
    parameter = normal(rng, (1000,), dtype).requires_grad_()
    state = {name: [torch.zeros(1000, dtype=dtype)] for name in MOMENTS[rule]} | {"theta": [parameter.detach().clone()]}
    optimizer = (torch.optim.Adam if rule == "adam" else torch.optim.AdamW)(
        [parameter], lr=1e-3, betas=betas, eps=1e-6, weight_decay=0.0, foreach=False
    )
    for t, scale in enumerate((1e8, 1.0, 1e-3), start=1):
        parameter.grad = normal(rng, (1000,), dtype) * scale
        optimizer.step()
        call(state, [], [parameter.grad], rule=rule, lr=1e-3, beta1=betas[0], beta2=betas[1], eps=1e-6, step=t)
        for name, want in moments_of(optimizer, parameter).items():
            assert_ulps(state[name][0], want, 4.0)
        assert_ulps(state["theta"][0], parameter.detach(), 4.0, parameter.detach().abs().clamp_min(1e-2))


def make_optimizer(
    rule: str, parameters: Sequence[Tensor], weight_decay: float = HYPER["weight_decay"]
) -> torch.optim.Optimizer:
    common = {"lr": HYPER["lr"], "weight_decay": weight_decay, "foreach": False}
    if rule in ("sgd", "momentum"):
        return torch.optim.SGD(parameters, momentum=HYPER["momentum"] if rule == "momentum" else 0.0, **common)
    adam = torch.optim.Adam if rule == "adam" else torch.optim.AdamW
    return adam(parameters, betas=(HYPER["beta1"], HYPER["beta2"]), eps=HYPER["eps"], **common)


def moments_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    names = {"momentum_buffer": "first", "exp_avg": "first", "exp_avg_sq": "second"}
    held = optimizer.state[parameter]
    return {names[key]: value for key, value in held.items() if key in names and value is not None}


@pytest.mark.parametrize("rule", RULES)
def test_infinite_weights_stay_where_nothing_moves_them(rule: str) -> None:
    """As in torch.optim: a mask of -inf kept as a parameter must not become NaN through 0 · inf of absent decay."""
    parameter = torch.tensor([float("inf"), -float("inf"), 1.0], requires_grad=True)
    parameter.grad = torch.tensor([0.0, 0.0, 1.0])
    state = {"theta": [parameter.detach().clone()]} | {name: [torch.zeros(3)] for name in MOMENTS[rule]}
    call(state, retain=[parameter.grad], rule=rule, **HYPER | {"weight_decay": 0.0})
    make_optimizer(rule, [parameter], weight_decay=0.0).step()
    assert_ulps(state["theta"][0], parameter.detach(), 4)


# --- Dtypes, layouts, lists ---------------------------------------------------------------------------------


@pytest.mark.parametrize("retain_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forget_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_mix_of_dtypes(
    dtype: torch.dtype, forget_dtype: torch.dtype, retain_dtype: torch.dtype, rng: torch.Generator
) -> None:
    shapes = ((45,), (300,))
    state = new_state(rng, shapes, dtype, "adamw", slow=True)
    forget = [normal(rng, shape, forget_dtype) for shape in shapes]
    retain = [normal(rng, shape, retain_dtype) for shape in shapes]
    masks = [coin(rng, shape) for shape in shapes]
    options = {"rule": "adamw", "step": 3, "slow_rate": 0.3, "inverse_scale": 0.25, **HYPER, **FACTORS}
    expected = expect(state, forget, retain, masks, **options)
    call(state, forget, retain, bits=ops.pack_bits(masks), **options)
    assert_state(state, expected)


def test_a_list_may_mix_dtypes(rng: torch.Generator) -> None:
    parts = [new_state(rng, [(70,)], dtype, "adam", slow=True) for dtype in DTYPES]
    state = {name: [part[name][0] for part in parts] for name in parts[0]}
    retain = [normal(rng, (70,), dtype) for dtype in reversed(DTYPES)]
    options = {"rule": "adam", "slow_rate": 0.3, "step": 2, **HYPER}
    expected = expect(state, retain=retain, **options)
    call(state, retain=retain, **options)
    assert_state(state, expected)


HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_number_survives_a_step_of_zero(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    theta = every.clone()
    call({"theta": [theta]}, retain=[torch.zeros(2**16)], rule="sgd", lr=1.0)
    finite = every.isfinite() | every.isinf()
    assert same_bits(theta[finite], every[finite])
    assert theta[~finite].isnan().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_gradient_is_read_exactly(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for wide in (torch.float32, torch.float64):
        theta = torch.zeros(2**16, dtype=wide)
        call({"theta": [theta]}, [every], rule="sgd", lr=-1.0)
        assert_ulps(theta, every.to(wide), 0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_to_half_is_that_of_torch(dtype: torch.dtype, rng: torch.Generator) -> None:
    """Any float32: ties to even, subnormals, overflow to infinity, NaN."""
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    ties = halves[:-1] + (halves[1:] - halves[:-1]) / 2
    anything = torch.randint(-(2**31), 2**31, (50000,), generator=rng).to(torch.int32).view(torch.float32)
    values = torch.cat([ties, ties.nextafter(halves[1:]), ties.nextafter(halves[:-1]), anything])
    theta = torch.zeros(values.shape, dtype=dtype)
    call({"theta": [theta]}, [values], rule="sgd", lr=-1.0)
    assert_ulps(theta, values.to(dtype), 0)


def placed(arena: Arena, state: State, layouts: Sequence[Layout]) -> State:
    return {name: arena.place_each(tensors, layouts) for name, tensors in state.items()}


@layout_cases
@pytest.mark.parametrize("rule", RULES)
def test_layouts(rule: str, shape: tuple[int, ...], layout: Layout, arena: Arena, rng: torch.Generator) -> None:
    """All operands in one layout."""
    for dtype in DTYPES if math.prod(shape) < 10000 else (torch.bfloat16,):
        state = placed(arena, new_state(rng, [shape], dtype, rule, slow=True), [layout])
        forget, retain = ([arena.place(normal(rng, shape, dtype), layout)] for _ in range(2))
        mask = coin(rng, shape)
        options = {"rule": rule, "slow_rate": 0.6, "step": 4, "mask_scope": "all", **HYPER, **FACTORS}
        expected = expect(state, forget, retain, [mask], protect=True, **options)
        bits = [arena.place(word) for word in ops.pack_bits([arena.place(mask, layout)])]
        call(state, forget, retain, bits=bits, protect=True, **options)
        assert_state(state, expected)


def test_operands_of_differing_strides(arena: Arena, rng: torch.Generator) -> None:
    """A channels_last weight with contiguous gradients and moments must not pair the wrong elements."""
    shape = (6, 5, 3, 3)
    state = new_state(rng, [shape], torch.float32, "adamw", slow=True)
    layouts = {"theta": CHANNELS_LAST, "first": CONTIGUOUS, "second": Layout((3, 2, 1, 0)), "slow": MISALIGNED}
    state = {name: [arena.place(tensors[0], layouts[name])] for name, tensors in state.items()}
    forget = [arena.place(normal(rng, shape, torch.bfloat16), CONTIGUOUS)]
    retain = [arena.place(normal(rng, shape, torch.float32), Layout((1, 0, 2, 3), gap=2))]
    mask = coin(rng, shape)
    options = {"rule": "adamw", "slow_rate": 0.6, "step": 4, **HYPER, **FACTORS}
    expected = expect(state, forget, retain, [mask], **options)
    call(state, forget, retain, bits=ops.pack_bits([arena.place(mask, CHANNELS_LAST)]), **options)
    assert_state(state, expected)


@given(data=st.data())
def test_any_list_in_any_layout(data: st.DataObject) -> None:
    draw = data.draw
    rule, dtype = draw(st.sampled_from(RULES)), draw(st.sampled_from(DTYPES))
    parts = draw(st.sampled_from((*PARTS, "neither")))
    slow = parts == "neither" or draw(st.booleans())
    masked = draw(st.booleans())
    protect = masked and draw(st.booleans())
    shapes, layouts = zip(*draw(st.lists(shapes_and_layouts(), min_size=1, max_size=4)), strict=True)
    rng, arena = torch.Generator().manual_seed(draw(st.integers(0, 2**32))), Arena()

    def gradients() -> list[Tensor]:
        own = [draw(st.one_of(st.just(layout), layouts_of(len(s)))) for s, layout in zip(shapes, layouts, strict=True)]
        values = [normal(rng, shape, draw(st.sampled_from(DTYPES))) for shape in shapes]
        return arena.place_each(values, own)

    state = placed(arena, new_state(rng, shapes, dtype, rule, slow), layouts)
    forget = gradients() if parts in ("forget", "both") else []
    retain = gradients() if parts in ("retain", "both") else []
    masks = [coin(rng, shape) for shape in shapes] if masked else []
    bits = ops.pack_bits(arena.place_each(masks, layouts)) if masked else []
    options = {"mask_scope": draw(st.sampled_from(("forget", "all"))), "protect": protect, "rule": rule}
    options |= {"step": draw(st.integers(1, 1000)), "slow_rate": 0.35, "inverse_scale": 0.5, **HYPER, **FACTORS}
    before = clone(state)
    expected = expect(state, forget, retain, masks, **options)
    call(state, forget, retain, bits=bits, **options)
    assert_state(state, expected)
    arena.check()
    if protect:
        for name in state:
            for old, new, mask in zip(before[name], state[name], masks, strict=True):
                assert same_bits(old[~mask], new[~mask])


def test_a_list_gives_the_bits_that_each_tensor_gives_alone(rng: torch.Generator) -> None:
    """Where a tensor falls in the cut into blocks must not show: 300 small ones and two large ones."""
    shapes = [(i % 97,) for i in range(300)] + [(50001,), (40000,)]
    together = new_state(rng, shapes, torch.float32, "adamw", slow=True)
    alone = clone(together)
    forget, retain = ([normal(rng, shape, torch.float32) for shape in shapes] for _ in range(2))
    bits = ops.pack_bits([coin(rng, shape) for shape in shapes])
    options = {"rule": "adamw", "slow_rate": 0.5, **HYPER, **FACTORS}
    call(together, forget, retain, bits=bits, **options)
    for i in range(len(shapes)):
        one = {name: [tensors[i]] for name, tensors in alone.items()}
        call(one, [forget[i]], [retain[i]], bits=[bits[i]], **options)
    for name, tensors in together.items():
        assert all(same_bits(a, b) for a, b in zip(tensors, alone[name], strict=True)), name


def test_an_empty_list_is_no_work() -> None:
    assert ops.step_([], rule="sgd", scalars=ops.scalars(lr=1.0)) is None
