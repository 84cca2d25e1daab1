"""gradient_products: masked norms, inner product and the count of non-finite entries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from helpers import oracles
from helpers.layouts import (
    CHANNELS_LAST,
    CONTIGUOUS,
    DTYPES,
    Arena,
    Layout,
    coin,
    layout_cases,
    layouts_of,
    normal,
    shapes_and_layouts,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unlearn_ext import ops

SCOPES = ("forget", "all")


def expect(
    forget: Sequence[Tensor] = (),
    retain: Sequence[Tensor] = (),
    masks: Sequence[Tensor] = (),
    mask_scope: str = "forget",
) -> list[float]:
    f, r = ([g.double().numpy() for g in grads] for grads in (forget, retain))
    return oracles.products(f, r, [m.numpy() for m in masks] if masks else None, mask_scope)


def assert_products(got: Tensor, expected: Sequence[float]) -> None:
    """Relative to the sum of magnitudes, which Cauchy and Schwarz bound for the inner product."""
    assert got.dtype == torch.float64 and got.shape == (4,)
    f, r, cross, count = got.tolist()
    assert count == expected[3]
    if count:
        return
    assert math.isclose(f, expected[0], rel_tol=1e-14)
    assert math.isclose(r, expected[1], rel_tol=1e-14)
    assert abs(cross - expected[2]) <= 1e-14 * math.sqrt(expected[0] * expected[1])


def test_hand_computed() -> None:
    # Kept: 3 and 4 of the forget gradient. Σ = 9 + 16; retain 1 + 4 + 0.25; 3·1 + 4·0.5.
    forget, retain = [torch.tensor([3.0, 7.0]), torch.tensor(4.0)], [torch.tensor([1.0, 2.0]), torch.tensor(0.5)]
    bits = ops.pack_bits([torch.tensor([True, False]), torch.tensor(True)])
    assert ops.gradient_products(forget, retain, bits).tolist() == [25.0, 5.25, 5.0, 0.0]
    # Both masked: retain 1 + 0.25.
    assert ops.gradient_products(forget, retain, bits, "all").tolist() == [25.0, 1.25, 5.0, 0.0]
    assert ops.gradient_products(forget, bits=bits).tolist() == [25.0, 0.0, 0.0, 0.0]
    assert ops.gradient_products((), retain, bits).tolist() == [0.0, 5.25, 0.0, 0.0]
    assert ops.gradient_products((), retain, bits, "all").tolist() == [0.0, 1.25, 0.0, 0.0]


@pytest.mark.parametrize("retain_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forget_dtype", DTYPES, ids=str)
def test_every_mix_of_dtypes(forget_dtype: torch.dtype, retain_dtype: torch.dtype, rng: torch.Generator) -> None:
    shapes = ((), (33,), (5, 200), (0,), (17000,))
    forget = [normal(rng, shape, forget_dtype) for shape in shapes]
    retain = [normal(rng, shape, retain_dtype) for shape in shapes]
    masks = [coin(rng, shape) for shape in shapes]
    bits = ops.pack_bits(masks)
    for scope in SCOPES:
        got = ops.gradient_products(forget, retain, bits, scope)
        assert_products(got, expect(forget, retain, masks, scope))
    assert_products(ops.gradient_products(forget, retain), expect(forget, retain))


def test_a_list_may_mix_dtypes(rng: torch.Generator) -> None:
    forget = [normal(rng, (500,), dtype) for dtype in DTYPES]
    retain = [normal(rng, (500,), dtype) for dtype in reversed(DTYPES)]
    assert_products(ops.gradient_products(forget, retain), expect(forget, retain))


def test_squares_are_summed_in_double() -> None:
    """1 + n tiny squares, each lost in float32; and squares beyond float32 and float16."""
    tiny = torch.full((100001,), 2.0**-15)
    tiny[0] = 1.0
    assert ops.gradient_products([tiny])[0] == 1 + 1e5 * 2.0**-30
    for dtype, value in ((torch.float32, 2.0**100), (torch.float16, 2.0**15), (torch.float32, 2.0**-80)):
        big = torch.full((40,), value, dtype=dtype)
        assert ops.gradient_products([big], [big]).tolist() == [40 * value * value] * 3 + [0.0]


def test_is_the_norm_that_torch_clips_by(rng: torch.Generator) -> None:
    parameters = [torch.zeros(shape, requires_grad=True) for shape in ((100, 30), (7,), ())]
    for parameter in parameters:
        parameter.grad = normal(rng, parameter.shape, torch.float32)
    norm = ops.gradient_products([p.grad for p in parameters])[0].sqrt()
    torch.testing.assert_close(torch.nn.utils.get_total_norm([p.grad for p in parameters]).double(), norm)


@layout_cases
def test_layouts(shape: tuple[int, ...], layout: Layout, arena: Arena, rng: torch.Generator) -> None:
    """The guards around every operand are NaN: one value read beyond it would be counted."""
    for dtype in DTYPES:
        forget, retain = ([arena.place(normal(rng, shape, dtype), layout)] for _ in range(2))
        mask = coin(rng, shape)
        bits = [arena.place(word) for word in ops.pack_bits([arena.place(mask, layout)])]
        assert_products(ops.gradient_products(forget, retain, bits), expect(forget, retain, [mask]))


def test_operands_of_differing_strides(arena: Arena, rng: torch.Generator) -> None:
    shape = (6, 5, 3, 3)
    values, mask = [normal(rng, shape) for _ in range(2)], coin(rng, shape)
    for one, other in ((CHANNELS_LAST, CONTIGUOUS), (CONTIGUOUS, CHANNELS_LAST), (CHANNELS_LAST, Layout(gap=2))):
        forget, retain = [arena.place(values[0], one)], [arena.place(values[1], other)]
        bits = ops.pack_bits([arena.place(mask, one)])
        for scope in SCOPES:
            assert_products(ops.gradient_products(forget, retain, bits, scope), expect(forget, retain, [mask], scope))


@given(data=st.data())
def test_any_list_in_any_layout(data: st.DataObject) -> None:
    draw = data.draw
    shapes, layouts = zip(*draw(st.lists(shapes_and_layouts(), min_size=1, max_size=5)), strict=True)
    rng, arena = torch.Generator().manual_seed(draw(st.integers(0, 2**32))), Arena()
    with_forget, with_retain = draw(st.sampled_from(((True, True), (True, False), (False, True))))
    masked, scope = draw(st.booleans()), draw(st.sampled_from(SCOPES))

    def gradients(own: Sequence[Layout]) -> list[Tensor]:
        values = [normal(rng, shape, draw(st.sampled_from(DTYPES))) for shape in shapes]
        for value in values:
            if value.numel() and draw(st.booleans()):
                value.view(-1)[draw(st.integers(0, value.numel() - 1))] = draw(st.sampled_from((math.nan, math.inf)))
        return arena.place_each(values, own)

    forget = gradients(layouts) if with_forget else []
    retain = gradients([draw(layouts_of(len(s))) for s in shapes] if with_forget else layouts) if with_retain else []
    masks = [coin(rng, shape) for shape in shapes] if masked else []
    bits = ops.pack_bits(arena.place_each(masks, layouts)) if masked else []
    assert_products(ops.gradient_products(forget, retain, bits, scope), expect(forget, retain, masks, scope))
    arena.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_entries_are_counted_where_they_count(dtype: torch.dtype, rng: torch.Generator) -> None:
    size = 5000
    mask = coin(rng, (size,))
    forget, retain = normal(rng, (size,), dtype), normal(rng, (size,), dtype)
    odd = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype).repeat(100)
    at = torch.randperm(size, generator=rng)
    forget[at[:300]], retain[at[200:500]] = odd, odd
    bits = ops.pack_bits([mask])

    assert ops.gradient_products([forget], [retain])[3] == 600
    kept_forget, kept_retain = mask[at[:300]].sum(), mask[at[200:500]].sum()
    assert 0 < kept_forget < 300
    assert ops.gradient_products([forget], [retain], bits)[3] == kept_forget + 300
    assert ops.gradient_products([forget], [retain], bits, "all")[3] == kept_forget + kept_retain

    # Masked out, they leave no trace in the sums either.
    clean = mask & forget.isfinite() & retain.isfinite()
    got = ops.gradient_products([forget], [retain], ops.pack_bits([clean]), "all")
    assert_products(got, expect([forget], [retain], [clean], "all"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_finite_numbers_are_finite(dtype: torch.dtype) -> None:
    """Overflow of a square is not a non-finite entry."""
    assert ops.gradient_products([torch.full((33,), torch.finfo(dtype).max, dtype=dtype)])[3] == 0
