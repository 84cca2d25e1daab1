"""step_: masks and protection, interpolation, skipping, stochastic rounding."""

from __future__ import annotations

import pytest
import torch
from helpers.layouts import (
    DTYPES,
    LAYOUTS,
    RULES,
    assert_ulps,
    coin,
    normal,
    same_bits,
    ulps,
)
from helpers.steps import HYPER, MOMENTS, assert_state, call, clone, expect, new_state
from torch import Tensor

from unlearn_ext import ops

# --- Masks and protection -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_masked_out_non_finite_gradients_do_not_leak(
    rule: str, dtype: torch.dtype, value: float, rng: torch.Generator
) -> None:
    mask = coin(rng, (100,))
    clean = normal(rng, (100,), dtype)
    dirty = clean.clone()
    dirty[~mask] = value
    for scope in ("forget", "all"):
        state = new_state(rng, [(100,)], dtype, rule, slow=True)
        other = clone(state)
        options = {"rule": rule, "bits": ops.pack_bits([mask]), "mask_scope": scope, **HYPER}
        call(state, [clean], [clean], **options)
        call(other, [dirty], [dirty if scope == "all" else clean], **options)
        assert all(same_bits(state[name][0], other[name][0]) for name in state)


def test_kept_non_finite_gradients_do_show(rng: torch.Generator) -> None:
    state = new_state(rng, [(64,)], torch.float32, "sgd")
    gradient = normal(rng, (64,), torch.float32)
    gradient[40] = float("nan")
    call(state, [gradient], rule="sgd", lr=0.1, bits=ops.pack_bits([torch.arange(64) >= 32]))
    assert torch.equal(state["theta"][0].isnan(), torch.arange(64) == 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_protected_weights_keep_their_bits_for_100_adamw_steps(dtype: torch.dtype, rng: torch.Generator) -> None:
    shapes = ((7, 11), (1000,), ())
    state = new_state(rng, shapes, dtype, "adamw", slow=True)
    masks = [coin(rng, shape) for shape in shapes[:2]] + [torch.tensor(False)]
    first = clone(state)
    fixed = {"rule": "adamw", "bits": ops.pack_bits(masks), "protect": True, "mask_scope": "all"}
    for t in range(1, 101):
        forget, retain = ([normal(rng, shape, dtype) for shape in shapes] for _ in range(2))
        seed = t if dtype == torch.bfloat16 else None
        call(state, forget, retain, step=t, slow_rate=0.5, rounding_seed=seed, **fixed, **HYPER)
    for name, tensors in state.items():
        for old, new, mask in zip(first[name], tensors, masks, strict=True):
            assert same_bits(old[~mask], new[~mask])
            assert not same_bits(old[mask], new[mask]) or not mask.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_protected_representations_survive(rule: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    """A NaN's payload, a signalling NaN, -0 and subnormals are bits like all others."""
    size = torch.empty((), dtype=dtype).element_size()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    info = torch.finfo(dtype)
    infinity = torch.tensor(float("inf"), dtype=dtype).view(integer)
    tiny = torch.tensor([-0.0, info.smallest_normal / 2, -info.smallest_normal * info.eps], dtype=dtype)
    odd = torch.cat([infinity.reshape(1), infinity + torch.arange(1, 30), tiny.view(integer)]).to(integer)
    theta = odd.repeat(3).view(dtype)
    state = new_state(rng, [theta.shape], dtype, rule, slow=True)
    state["theta"][0].copy_(theta)
    state["theta"][0].view(integer).copy_(odd.repeat(3))
    before = clone(state)
    gradient = normal(rng, theta.shape, dtype)
    bits = ops.pack_bits([torch.zeros(theta.shape, dtype=torch.bool)])
    call(state, [gradient], [gradient], rule=rule, bits=bits, protect=True, slow_rate=0.5, **HYPER)
    assert all(same_bits(before[name][0], state[name][0]) for name in state)


# --- Interpolation, skipping, rounding ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interpolation_alone(dtype: torch.dtype, rng: torch.Generator) -> None:
    """Without gradients neither the rule nor its moments or decay take part."""
    state = new_state(rng, [(77,), ()], dtype, "adamw", slow=True)
    before = clone(state)
    expected = expect(state, rule="adamw", slow_rate=0.25, **HYPER)
    call(state, rule="adamw", slow_rate=0.25, **HYPER)
    assert_state(state, expected)
    for name in ("first", "second"):
        assert all(same_bits(a, b) for a, b in zip(before[name], state[name], strict=True))
    for theta, slow in zip(state["theta"], state["slow"], strict=True):
        assert same_bits(theta, slow.to(dtype))


@pytest.mark.parametrize("rule", RULES)
def test_skip_writes_nothing(rule: str, rng: torch.Generator) -> None:
    for flag in (True, torch.tensor(True), torch.tensor(3.0, dtype=torch.float64)):
        state = new_state(rng, [(5, 9), (40,)], torch.float32, rule, slow=True)
        state["theta"][0] = state["theta"][0].t()
        state["slow"][0] = state["slow"][0].t().contiguous()
        before = clone(state)
        gradients = [torch.full(theta.shape, float("nan")) for theta in state["theta"]]
        for moment in MOMENTS[rule]:
            state[moment][0] = state[moment][0].t()
            before[moment][0] = before[moment][0].t()
        call(state, gradients, gradients, rule=rule, skip=flag, slow_rate=0.5, **HYPER)
        assert all(same_bits(a, b) for name in state for a, b in zip(before[name], state[name], strict=True))


def test_a_false_skip_flag_does_not_skip(rng: torch.Generator) -> None:
    theta = torch.ones(3)
    call({"theta": [theta]}, retain=[torch.ones(3)], rule="sgd", lr=0.25, skip=torch.tensor(False))
    assert theta.tolist() == [0.75] * 3


def test_scalars_take_tensors_for_clips() -> None:
    theta = torch.ones(3)
    clip = torch.tensor(0.5, dtype=torch.float64)
    factors = {"forget_clip": clip, "retain_clip": 2 * clip}
    call({"theta": [theta]}, [torch.ones(3)], [torch.ones(3)], rule="sgd", lr=0.25, **factors)
    assert theta.tolist() == [1 - 0.25 * (0.5 + 1.0)] * 3


def test_stochastic_rounding_is_unbiased() -> None:
    # Between 1.5 and 1.5 + 2^-7, its neighbour in bfloat16, in 16 places; 20,000 weights each, |z| < 5.
    ulp, count = 2.0**-7, 20000
    fractions = (torch.arange(16) / 16 + 1 / 64).repeat_interleave(count)
    theta = torch.full((16 * count,), 1.5, dtype=torch.bfloat16)
    call({"theta": [theta]}, retain=[-fractions * ulp], rule="sgd", lr=1.0, rounding_seed=7)
    up = theta.float() > 1.5
    assert set(theta.float().unique().tolist()) == {1.5, 1.5 + ulp}
    p = fractions[::count]
    z = (up.view(16, count).float().mean(1) - p) / (p * (1 - p) / count).sqrt()
    assert z.abs().max() < 5, z
    # No pattern along the tensor: neighbours at any small distance are uncorrelated.
    noise = up.float() - fractions
    for distance in (1, 2, 16, 32, 64, 256, 16384):
        correlation = (noise[distance:] * noise[:-distance]).mean() / noise.square().mean()
        assert abs(correlation) < 5 / (len(noise) - distance) ** 0.5, distance


def test_stochastic_rounding_follows_its_seed(rng: torch.Generator) -> None:
    def step(seed: int | None, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        weights = [torch.full((5000,), 1.5, dtype=dtype) for _ in range(2)]
        gradients = [torch.full((5000,), 2.0**-9) for _ in range(2)]
        call({"theta": weights}, retain=gradients, rule="sgd", lr=1.0, rounding_seed=seed)
        return weights

    first, second = step(3)
    assert torch.equal(first, step(3)[0]) and torch.equal(second, step(3)[1])
    assert not torch.equal(first, second), "tensors of a list need noise of their own"
    assert not torch.equal(first, step(4)[0])
    assert not torch.equal(first, step(3 + 2**32)[0])
    assert torch.equal(step(None)[0], torch.full((5000,), 1.5, dtype=torch.bfloat16))
    for dtype in (torch.float64, torch.float32, torch.float16):
        assert torch.equal(step(None, dtype)[0], step(3, dtype)[0])


def test_stochastic_rounding_keeps_infinities_and_exact_numbers() -> None:
    theta = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.5, 0.0, -2.0], dtype=torch.bfloat16)
    before = theta.clone()
    state = {"theta": [theta], "first": [torch.zeros(6)], "second": [torch.zeros(6)]}
    for seed in range(20):
        call(state, retain=[torch.zeros(6)], rule="adamw", lr=1.0, rounding_seed=seed)
    assert torch.equal(ulps(theta, before), torch.zeros(6, dtype=torch.float64))


def test_moments_and_slow_weights_are_not_rounded_stochastically(rng: torch.Generator) -> None:
    """Stochastic rounding concerns the weights alone, and comes after the interpolation."""
    state = new_state(rng, [shape for shape, _ in LAYOUTS.values()], torch.bfloat16, "adamw", slow=True)
    other = clone(state)
    gradients = [normal(rng, theta.shape, torch.bfloat16) for theta in state["theta"]]
    options = {"rule": "adamw", "slow_rate": 0.5, **HYPER}
    expected = expect(state, retain=gradients, **options)
    call(state, retain=gradients, **options)
    call(other, retain=gradients, rounding_seed=11, **options)
    for name in ("first", "second", "slow"):
        assert all(same_bits(a, b) for a, b in zip(state[name], other[name], strict=True))
    for got, want in zip(other["theta"], expected, strict=True):
        assert_ulps(got, want["theta"], 1.01, want["theta_scale"])
