"""accumulate_fisher_, ratio_bits, pack_bits, unpack_bits and count_bits."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import oracles
from helpers.layouts import (
    CHANNELS_LAST,
    CONTIGUOUS,
    DTYPES,
    TRANSPOSED,
    Arena,
    Layout,
    assert_ulps,
    coin,
    layout_cases,
    layouts_of,
    memory_order,
    normal,
    shapes_and_layouts,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unlearn_ext import ops

STATE_DTYPES = (torch.float32, torch.float64)


# --- Fisher -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STATE_DTYPES, ids=str)
def test_fisher_hand_computed(dtype: torch.dtype) -> None:
    # 1 + 0.5·3² = 5.5; 0 + 0.5·(-2)² = 2
    fisher = [torch.tensor([1.0, 0.0], dtype=dtype)]
    ops.accumulate_fisher_(fisher, [torch.tensor([3.0, -2.0], dtype=dtype)], 0.5)
    assert fisher[0].tolist() == [5.5, 2.0]


@pytest.mark.parametrize("gradient_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", STATE_DTYPES, ids=str)
def test_fisher_streams(dtype: torch.dtype, gradient_dtype: torch.dtype, rng: torch.Generator) -> None:
    shapes = ((), (33, 5), (0,), (17000,))
    fisher = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    for _ in range(3):
        grads = [normal(rng, shape, gradient_dtype) for shape in shapes]
        expected = [oracles.fisher(f.numpy(), g.double().numpy(), 0.3) for f, g in zip(fisher, grads, strict=True)]
        ops.accumulate_fisher_(fisher, grads, 0.3)
        for got, want in zip(fisher, expected, strict=True):
            assert_ulps(got, want, 4)


@layout_cases
def test_fisher_layouts(shape: tuple[int, ...], layout: Layout, arena: Arena, rng: torch.Generator) -> None:
    for dtype in STATE_DTYPES:
        fisher, grad = (arena.place(normal(rng, shape, dtype).abs(), layout) for _ in range(2))
        expected = oracles.fisher(fisher.numpy(), grad.numpy(), 2.0)
        ops.accumulate_fisher_([fisher], [grad], 2.0)
        assert_ulps(fisher, expected, 4)


@given(data=st.data())
def test_fisher_of_any_list_in_any_layout(data: st.DataObject) -> None:
    draw = data.draw
    shapes, layouts = zip(*draw(st.lists(shapes_and_layouts(), min_size=1, max_size=4)), strict=True)
    rng, arena = torch.Generator().manual_seed(draw(st.integers(0, 2**32))), Arena()
    dtype, gradient_dtype = draw(st.sampled_from(STATE_DTYPES)), draw(st.sampled_from(DTYPES))
    fisher = arena.place_each([normal(rng, shape, dtype).abs() for shape in shapes], layouts)
    grads = [arena.place(normal(rng, shape, gradient_dtype), draw(layouts_of(len(shape)))) for shape in shapes]
    expected = [oracles.fisher(f.numpy(), g.double().numpy(), 0.7) for f, g in zip(fisher, grads, strict=True)]
    ops.accumulate_fisher_(fisher, grads, 0.7)
    for got, want in zip(fisher, expected, strict=True):
        assert_ulps(got, want, 4)
    arena.check()


def test_fisher_of_nothing() -> None:
    assert ops.accumulate_fisher_([], []) is None


# --- Ratio --------------------------------------------------------------------------------------------------


def ratio_mask(forget: Tensor, retain: Tensor, **options: float) -> tuple[Tensor, int]:
    bits, counts = ops.ratio_bits([forget], [retain], **options)
    assert bits[0].dtype == torch.int32 and counts.dtype == torch.int64 and counts.shape == (1,)
    return ops.unpack_bits(bits, [forget])[0], int(counts[0])


def assert_ratio(got: Tensor, forget: Tensor, retain: Tensor, **options: float) -> None:
    """Exact, but for ratios that differ from gamma by rounding alone."""
    exact = torch.as_tensor(oracles.ratio(forget.double().numpy(), retain.double().numpy(), **options))
    near = (exact - 1).abs() <= 8 * torch.finfo(forget.dtype).eps
    assert torch.equal(got | near, (exact >= 1) | near)
    assert near.sum() <= 0.01 * near.numel() + 1, "the data should decide"


@pytest.mark.parametrize("dtype", STATE_DTYPES, ids=str)
def test_ratio_hand_computed(dtype: torch.dtype) -> None:
    # Ratios 2, 1, 0.5, then (0 + eps)/(0 + eps) = 1, huge, tiny; a NaN is not salient.
    forget = torch.tensor([2.0, 3.0, 1.0, 0.0, 1.0, 0.0, math.nan, 1.0, math.inf], dtype=dtype)
    retain = torch.tensor([1.0, 3.0, 2.0, 0.0, 0.0, 1.0, 1.0, math.nan, math.inf], dtype=dtype)
    one = [True, True, False, True, True, False, False, False, False]
    more = [True, False, False, False, True, False, False, False, False]
    for gamma, expected in ((1.0, one), (1.5, more)):
        mask, count = ratio_mask(forget, retain, gamma=gamma)
        assert mask.tolist() == expected
        assert count == sum(expected)


@pytest.mark.parametrize("dtype", STATE_DTYPES, ids=str)
def test_ratio_options(dtype: torch.dtype, rng: torch.Generator) -> None:
    shape = (73, 251)
    forget, retain = (normal(rng, shape, dtype).square() for _ in range(2))
    for options in (
        {},
        {"gamma": 3.0},
        {"gamma": 0.25, "forget_scale": 1 / 13, "retain_scale": 1 / 117},
        {"eps": 0.5, "gamma": 1.5},
    ):
        mask, count = ratio_mask(forget, retain, **options)
        assert_ratio(mask, forget, retain, **options)
        assert count == mask.sum()


@layout_cases
def test_ratio_layouts(shape: tuple[int, ...], layout: Layout, arena: Arena, rng: torch.Generator) -> None:
    for dtype in STATE_DTYPES:
        forget, retain = (arena.place(normal(rng, shape, dtype).square(), layout) for _ in range(2))
        mask, count = ratio_mask(forget, retain, gamma=0.9)
        assert_ratio(mask, forget, retain, gamma=0.9)
        assert count == mask.sum()


@given(data=st.data())
def test_ratio_of_any_list_in_any_layout(data: st.DataObject) -> None:
    draw = data.draw
    shapes, layouts = zip(*draw(st.lists(shapes_and_layouts(), min_size=1, max_size=4)), strict=True)
    rng, arena = torch.Generator().manual_seed(draw(st.integers(0, 2**32))), Arena()
    dtype = draw(st.sampled_from(STATE_DTYPES))
    # Powers of two: every ratio is exact, and many equal gamma.
    forget, retain = (
        [torch.exp2(torch.randint(-3, 4, shape, generator=rng).to(dtype)) for shape in shapes] for _ in range(2)
    )
    expected = [f / r >= 2 for f, r in zip(forget, retain, strict=True)]
    forget = arena.place_each(forget, layouts)
    retain = [arena.place(r, draw(layouts_of(r.dim()))) for r in retain]
    bits, counts = ops.ratio_bits(forget, retain, gamma=2.0, eps=0.0)
    assert counts.tolist() == [int(mask.sum()) for mask in expected]
    for word, mask, layout in zip(bits, expected, layouts, strict=True):
        assert word.tolist() == oracles.pack(memory_order(mask, layout).numpy())
    arena.check()


def test_ratio_of_nothing() -> None:
    bits, counts = ops.ratio_bits([], [])
    assert bits == [] and counts.tolist() == []


# --- Bits ---------------------------------------------------------------------------------------------------


def test_pack_hand_computed() -> None:
    # Bits 0, 2 and 31 of the first word (2^31 is the sign bit: -2^31 + 5), bit 1 of the second.
    mask = torch.zeros(34, dtype=torch.bool)
    mask[[0, 2, 31, 33]] = True
    (word,) = ops.pack_bits([mask])
    assert word.dtype == torch.int32 and word.is_contiguous()
    assert word.tolist() == [-(2**31) + 5, 2]
    assert ops.count_bits([word]).tolist() == [4]


def test_pack_follows_memory_order() -> None:
    # [[1, 0, 0], [1, 1, 0]] column by column: 1 1 0 1 0 0, that is 1 + 2 + 8.
    mask = torch.tensor([[True, False, False], [True, True, False]])
    transposed = mask.t().contiguous().t()
    assert [int(word) for word in ops.pack_bits([mask, transposed])] == [0b011001, 0b001011]


@layout_cases
def test_pack_layouts(shape: tuple[int, ...], layout: Layout, arena: Arena, rng: torch.Generator) -> None:
    mask = coin(rng, shape)
    (word,) = ops.pack_bits([arena.place(mask, layout)])
    assert word.tolist() == oracles.pack(memory_order(mask, layout).numpy())
    assert ops.count_bits([arena.place(word)]).tolist() == [int(mask.sum())]
    for dtype in (torch.bfloat16, torch.float64):
        (back,) = ops.unpack_bits([arena.place(word)], [arena.place(torch.zeros(shape, dtype=dtype), layout)])
        assert back.dtype == torch.bool
        assert torch.equal(back, mask)


@given(data=st.data())
def test_pack_and_unpack_any_list(data: st.DataObject) -> None:
    draw = data.draw
    shapes, layouts = zip(*draw(st.lists(shapes_and_layouts(), min_size=1, max_size=6)), strict=True)
    rng, arena = torch.Generator().manual_seed(draw(st.integers(0, 2**32))), Arena()
    masks = [coin(rng, shape, draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))) for shape in shapes]
    like = arena.place_each(masks, layouts)
    bits = ops.pack_bits(like)
    for word, mask, layout in zip(bits, masks, layouts, strict=True):
        assert word.tolist() == oracles.pack(memory_order(mask, layout).numpy())
    assert ops.count_bits(bits).tolist() == [int(mask.sum()) for mask in masks]
    assert all(torch.equal(a, b) for a, b in zip(ops.unpack_bits(bits, like), masks, strict=True))
    arena.check()


@pytest.mark.parametrize("layout", (CONTIGUOUS, CHANNELS_LAST, Layout((3, 2, 1, 0))), ids=str)
def test_unpacked_masks_have_the_strides_of_their_weights(layout: Layout, rng: torch.Generator) -> None:
    mask = coin(rng, (4, 5, 3, 2))
    like = Arena().place(torch.zeros(mask.shape), layout)
    (back,) = ops.unpack_bits(ops.pack_bits([Arena().place(mask, layout)]), [like])
    assert torch.equal(back, mask)
    assert back.stride() == like.stride()


def test_unpacked_masks_of_views_with_gaps_are_dense(rng: torch.Generator) -> None:
    mask = coin(rng, (6, 8))
    gaps = Arena().place(mask, Layout(TRANSPOSED.order, gap=2))
    (back,) = ops.unpack_bits(ops.pack_bits([gaps]), [gaps])
    assert torch.equal(back, mask)
    assert back.stride() == (1, 6)


def test_any_nonzero_byte_is_true() -> None:
    """Bool tensors that alias foreign memory may hold other bytes than 0 and 1."""
    odd = torch.tensor([0, 2, 255, 1, 0, 128], dtype=torch.uint8).view(torch.bool)
    assert ops.pack_bits([odd])[0].tolist() == [0b101110]


def test_count_ignores_no_bit() -> None:
    words = [torch.tensor([-1, 0, 1, -(2**31)], dtype=torch.int32), torch.zeros(0, dtype=torch.int32)]
    counts = ops.count_bits([*words, torch.full((5000,), -1, dtype=torch.int32)])
    assert counts.dtype == torch.int64
    assert counts.tolist() == [34, 0, 160000]


def test_bits_of_nothing() -> None:
    assert ops.pack_bits([]) == [] and ops.unpack_bits([], []) == []
    assert ops.count_bits([]).tolist() == [] and ops.count_bits([]).dtype == torch.int64
