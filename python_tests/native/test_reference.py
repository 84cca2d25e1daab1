"""The operators against csrc/reference.cpp: the same mathematics without lists, chunks, dtypes and threads.

A difference is a fault in those. The formulas themselves are checked elsewhere, by what does not share them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers.backends import PYTHON_BACKEND
from helpers.layouts import RULES, assert_ulps, coin, normal, same_bits
from torch import Tensor

from unlearn_ext import ops
from unlearn_ext.native import loading

pytestmark = pytest.mark.build

# Together more than one block of 16,384 weights, with borders of words and strips inside.
SIZES = (1, 31, 33, 257, 5003, 20011)
HYPER = {"lr": 0.05, "momentum": 0.9, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.03, "step": 3}
FACTORS = {"forget_weight": 0.7, "retain_weight": 1.3, "forget_clip": 0.45, "retain_clip": 0.9, "inverse_scale": 0.5}
ARGUMENTS = {"slow": "slow", "first_moments": "first_moment", "second_moments": "second_moment"}


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    try:
        return loading.build_reference()
    except loading.ToolchainError as error:
        if os.environ.get("UNLEARN_EXT_REQUIRE_NATIVE") == "1":
            raise
        pytest.skip(str(error))


def arrays(rng: torch.Generator) -> list[Tensor]:
    return [normal(rng, (size,)) for size in SIZES]


def words(bits: Sequence[Tensor]) -> list[np.ndarray]:
    return [word.numpy().view(np.uint32) for word in bits]


def assert_same(got: Tensor, want: np.ndarray) -> None:
    """2 ulp of 1, the size of what enters: a compiler may fuse a product with a sum here and not there."""
    wanted = torch.from_numpy(want)
    assert_ulps(got, wanted, 2, wanted.abs().clamp(min=1.0))


@pytest.mark.parametrize("scope", ("none", "forget", "all", "protect"))
@pytest.mark.parametrize("slow", (False, True), ids=("fast", "slow"))
@pytest.mark.parametrize("parts", ("forget", "retain", "both"))
@pytest.mark.parametrize("rule", RULES)
def test_step(rule: str, parts: str, slow: bool, scope: str, reference: ModuleType, rng: torch.Generator) -> None:
    weights = arrays(rng)
    gradients = {name: arrays(rng) for name in ("forget", "retain") if parts in (name, "both")}
    state = {"slow": arrays(rng)} if slow else {}
    if rule != "sgd":
        state["first_moments"] = arrays(rng)
    if rule in ("adam", "adamw"):
        state["second_moments"] = [m.square() + 0.1 for m in arrays(rng)]
    masks = [coin(rng, (size,)) for size in SIZES]
    bits = [] if scope == "none" else ops.pack_bits(masks)
    scalars = ops.scalars(slow_rate=0.35, **HYPER, **FACTORS)

    everything = {"weights": weights, **state}
    before = {name: [t.clone() for t in tensors] for name, tensors in everything.items()}
    expected = {name: [t.numpy().copy() for t in tensors] for name, tensors in everything.items()}
    for i, theta in enumerate(expected["weights"]):
        reference.step(
            theta,
            scalars.numpy(),
            rule=ops.RULES.index(rule),
            bits=words(bits)[i] if bits else None,
            mask_retain=scope == "all",
            protect=scope == "protect",
            **{f"{name}_grad": tensors[i].numpy() for name, tensors in gradients.items()},
            **{ARGUMENTS[name]: copies[i] for name, copies in expected.items() if name in ARGUMENTS},
        )
    ops.step_(
        weights,
        rule=rule,
        scalars=scalars,
        bits=bits,
        mask_scope="all" if scope == "all" else "forget",
        protect=scope == "protect",
        **{f"{name}_grads": tensors for name, tensors in gradients.items()},
        **state,
    )
    for name, tensors in everything.items():
        for got, want in zip(tensors, expected[name], strict=True):
            assert_same(got, want)
    for name in everything:
        assert not torch.equal(before[name][3], everything[name][3]), f"{name} did not move"
        if scope == "protect":
            assert torch.equal(before[name][3][~masks[3]], everything[name][3][~masks[3]])


def test_skip(reference: ModuleType, rng: torch.Generator) -> None:
    theta = arrays(rng)[0].numpy()
    before = theta.copy()
    reference.step(theta, ops.scalars(lr=1.0, skip=True).numpy(), rule=0, retain_grad=np.ones_like(theta))
    assert np.array_equal(theta, before)


@pytest.mark.parametrize("scope", ("none", "forget", "all"))
@pytest.mark.parametrize("slow", (False, True), ids=("fast", "slow"))
@pytest.mark.parametrize("parts", ("forget", "retain", "both"))
def test_update_gradient(parts: str, slow: bool, scope: str, reference: ModuleType, rng: torch.Generator) -> None:
    names = ("weights", *(f"{name}_grads" for name in ("forget", "retain") if parts in (name, "both")))
    operands = {name: arrays(rng) for name in (*names, "slow")[: len(names) + slow]}
    output_grads = arrays(rng)
    bits = [] if scope == "none" else ops.pack_bits([coin(rng, (size,)) for size in SIZES])
    scalars = ops.scalars(slow_rate=0.35, **HYPER, **FACTORS)
    lists = {name: operands.get(name, []) for name in ("weights", "slow", "forget_grads", "retain_grads")}
    *got, of_scalars = torch.ops.unlearn_ext.update_backward(
        output_grads, *lists.values(), bits, scalars, scope == "all", True, True, True, True, True
    )
    total, magnitude = np.zeros(len(ops.SCALARS)), sum(d.abs().sum().item() for d in output_grads)
    for i, output_grad in enumerate(output_grads):
        *want, terms = reference.update_gradient(
            output_grad.numpy(),
            operands["weights"][i].numpy(),
            scalars.numpy(),
            bits=words(bits)[i] if bits else None,
            mask_retain=scope == "all",
            **{name.removesuffix("s"): tensors[i].numpy() for name, tensors in operands.items() if name != "weights"},
        )
        total += terms
        for gradients, wanted in zip(got, want, strict=True):
            assert bool(gradients) == (wanted is not None)
            if gradients:
                assert_same(gradients[i], wanted)
    assert_ulps(of_scalars, total, 2, magnitude)
    assert (of_scalars != 0).sum() >= 5 + slow


@pytest.mark.parametrize("scope", ("none", "forget", "all"))
def test_gradient_products(scope: str, reference: ModuleType, rng: torch.Generator) -> None:
    forget, retain = arrays(rng), arrays(rng)
    forget[4][100] = forget[4][200] = float("inf")
    masks = [coin(rng, (size,)) for size in SIZES]
    masks[4][100] = False  # counts only without a mask
    masks[4][200] = True
    bits = [] if scope == "none" else ops.pack_bits(masks)
    for spoilt in (False, True):
        if not spoilt:
            clean = [torch.where(f.isfinite(), f, 0.0) for f in forget]
        got = ops.gradient_products(forget if spoilt else clean, retain, bits, "all" if scope == "all" else "forget")
        want = [
            reference.gradient_products(
                (forget if spoilt else clean)[i].numpy(),
                retain[i].numpy(),
                bits=words(bits)[i] if bits else None,
                mask_retain=scope == "all",
            )
            for i in range(len(SIZES))
        ]
        total = np.sum(want, axis=0)
        assert got[3] == total[3] == (0 if not spoilt else 2 if scope == "none" else 1)
        if not spoilt:
            # Sums in another order; the cross products cancel, so their error is relative to the squares.
            assert_ulps(got[:3], total[:3], 16, max(total[:2]))


@pytest.mark.parametrize("weight", (1.0, 0.3))
def test_fisher(weight: float, reference: ModuleType, rng: torch.Generator) -> None:
    fisher, gradients = [f.square() for f in arrays(rng)], arrays(rng)
    expected = [f.numpy().copy() for f in fisher]
    for want, gradient in zip(expected, gradients, strict=True):
        reference.accumulate_fisher(want, gradient.numpy(), weight)
    ops.accumulate_fisher_(fisher, gradients, weight)
    for got, want in zip(fisher, expected, strict=True):
        assert_same(got, want)


def test_salient(reference: ModuleType, rng: torch.Generator) -> None:
    forget, retain = ([f.square() for f in arrays(rng)] for _ in range(2))
    forget[3][:50] = retain[3][:50] = 0.0  # decided by eps: the ratio is 1
    options = {"gamma": 1.0, "eps": 1e-3, "forget_scale": 0.5, "retain_scale": 0.25}
    bits, counts = ops.ratio_bits(forget, retain, **options)
    for i, keep in enumerate(ops.unpack_bits(bits, forget)):
        want = reference.salient(forget[i].numpy(), retain[i].numpy(), **options)
        assert np.array_equal(keep.numpy(), want)
        assert counts[i] == want.sum()
    assert 0 < counts[5] < SIZES[5]


@pytest.mark.skipif(PYTHON_BACKEND, reason="the kernel's own random bits")
def test_stochastic_rounding(reference: ModuleType, rng: torch.Generator) -> None:
    """Each weight's noise is that of its seed, tensor and place, wherever the cut into strips and blocks falls."""
    weights = [normal(rng, (size,), torch.bfloat16) for size in SIZES]
    gradients = [0.01 * normal(rng, (size,), torch.float32) for size in SIZES]
    exact = [weight.float() - gradient for weight, gradient in zip(weights, gradients, strict=True)]
    for seed in (3, 2**40 + 1):
        moved = [weight.clone() for weight in weights]
        ops.step_(moved, rule="sgd", scalars=ops.scalars(lr=1.0), retain_grads=gradients, rounding_seed=seed)
        for t, (got, values) in enumerate(zip(moved, exact, strict=True)):
            want = [reference.bfloat16_stochastic(value, seed, t, i) for i, value in enumerate(values.tolist())]
            assert got.float().tolist() == want
            nearest = [reference.bfloat16_nearest(value) for value in values.tolist()]
            assert values.bfloat16().float().tolist() == nearest
            assert len(want) < 100 or want != nearest


def test_bfloat16_at_the_edges(reference: ModuleType) -> None:
    """Rounding to nearest even as PyTorch does it, at ties, subnormals, overflow and infinities."""
    patterns = torch.tensor([0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x3F81, 0x7F7F, 0x7F80], dtype=torch.int32)
    low = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    values = ((patterns[:, None] << 16) + low).flatten().view(torch.float32)
    for value in torch.cat([values, -values]):
        got = torch.tensor(reference.bfloat16_nearest(value.item()))
        assert same_bits(got, value.bfloat16().float()) or (got.isnan() and value.isnan())
