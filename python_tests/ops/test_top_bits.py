"""top_bits: the choice of a stable sort, and exactly k weights, whatever the scores, layouts and threads."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import oracles
from helpers.backends import PYTHON_BACKEND
from helpers.layouts import (
    CHANNELS_LAST,
    DTYPES,
    TRANSPOSED,
    Arena,
    Layout,
    layout_cases,
    layouts_of,
    memory_order,
    normal,
    same_bits,
    shapes_and_layouts,
)
from helpers.processes import run_program
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unlearn_ext import ops

SPECIAL = (0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, -math.nan, 5e-324, -5e-324, 1e-40, 1e38, -1e38)
OPTIONS = {"eps": 0.5, "forget_scale": 0.25, "retain_scale": 2.0}


def flat_scores(values: Tensor, other: Tensor | None, kind: str, options: dict[str, float]) -> np.ndarray:
    """The oracle's scores in the opmath type, for tensors in one and the same order."""
    wide = torch.float64 in (values.dtype, values.dtype if other is None else other.dtype)
    dtype = torch.float64 if wide else torch.float32
    arrays = [None if t is None else t.to(dtype).numpy() for t in (values, other)]
    return oracles.score(kind, *arrays, **options)


def with_ties(rng: torch.Generator, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """Seven values and their products exact in every dtype: ties everywhere."""
    return torch.randint(-3, 4, tuple(shape), generator=rng).to(dtype)


def special(rng: torch.Generator, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    table = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
    return table[torch.randint(0, len(SPECIAL), tuple(shape), generator=rng)]


def nearby(rng: torch.Generator, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """Equal in all digits but the last."""
    unit = torch.finfo(dtype).eps
    return (1 + unit * torch.randint(0, 300, tuple(shape), generator=rng)).to(dtype)


MAKERS: dict[str, Callable[..., Tensor]] = {
    "normal": normal,
    "ties": with_ties,
    "special": special,
    "nearby": nearby,
    "equal": lambda rng, shape, dtype: torch.full(tuple(shape), 0.75, dtype=dtype),
    "nan": lambda rng, shape, dtype: torch.full(tuple(shape), math.nan, dtype=dtype),
}


# --- The choice ---------------------------------------------------------------------------------------------


def test_hand_computed() -> None:
    # -0 ties with 0, so the first of each is taken in its place; NaN comes after -inf.
    a = torch.tensor([math.nan, -1.0, -0.0, 3.0])
    b = torch.tensor([0.0, 3.0, -math.inf, math.inf])
    order = [("b", 3), ("a", 3), ("b", 1), ("a", 2), ("b", 0), ("a", 1), ("b", 2), ("a", 0)]
    for k in range(9):
        bits, counts = ops.top_bits([a, b], k)
        assert [word.dtype for word in bits] == [torch.int32] * 2 and counts.dtype == torch.int64
        words = {"a": 0, "b": 0}
        for name, place in order[:k]:
            words[name] |= 1 << place
        assert [int(word) for word in bits] == list(words.values()), k
        assert counts.tolist() == [bin(words[name]).count("1") for name in "ab"]


def test_scores_hand_computed() -> None:
    gradient, weight = torch.tensor([3.0, -4.0, 0.5, -1.0]), torch.tensor([-2.0, 0.5, 8.0, 5.0])
    for score, best in (("value", [0, 2, 3, 1]), ("magnitude", [1, 0, 3, 2])):
        for k in range(5):
            (word,), _ = ops.top_bits([gradient], k, score=score)
            assert int(word) == sum(1 << i for i in best[:k])
    # |g θ| = 6 2 4 5; (g/4 + 1/2)/(2θ + 1/2) = 1.25/-3.5, -0.5/1.5, 0.625/16.5, 0.25/10.5
    for score, best in (("product", [0, 3, 2, 1]), ("ratio", [2, 3, 1, 0])):
        for k in range(5):
            (word,), _ = ops.top_bits([gradient], k, other=[weight], score=score, **OPTIONS)
            assert int(word) == sum(1 << i for i in best[:k])


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stable_sort_chooses_the_same(dtype: torch.dtype, make: Callable[..., Tensor], rng: torch.Generator) -> None:
    """Tensors that end within words, strips and blocks; 50,001 weights are several pieces."""
    tensors = [make(rng, shape, dtype) for shape in ((), (33,), (0,), (50001,), (7, 31))]
    total = sum(t.numel() for t in tensors)
    scores = [t.double().flatten().numpy() for t in tensors]
    for k in (0, 1, 35, total // 3, total // 2, total - 1, total):
        bits, counts = ops.top_bits(tensors, k)
        expected = oracles.top(scores, k)
        assert counts.sum() == k and counts.tolist() == [int(mask.sum()) for mask in expected]
        assert [word.tolist() for word in bits] == [oracles.pack(mask) for mask in expected]


@given(data=st.data())
def test_any_list_in_any_layout(data: st.DataObject) -> None:
    draw = data.draw
    shapes, layouts = zip(*draw(st.lists(shapes_and_layouts(), min_size=1, max_size=5)), strict=True)
    rng, arena = torch.Generator().manual_seed(draw(st.integers(0, 2**32))), Arena()
    kind = draw(st.sampled_from(ops.SCORES))
    # Rounded ratios may differ in the last place; these are exact, as are products of small integers.
    makers = (with_ties,) if kind == "ratio" else (normal, with_ties, special, nearby)
    make = draw(st.sampled_from(makers))
    values = [make(rng, shape, draw(st.sampled_from(DTYPES))) for shape in shapes]
    other: list[Any] = [None] * len(values)
    if kind in ("product", "ratio"):
        other = [with_ties(rng, shape, draw(st.sampled_from(DTYPES))) for shape in shapes]
    if kind == "ratio":
        other = [torch.exp2(o) for o in other]
    options = {"eps": 0.0, "forget_scale": 0.25, "retain_scale": 2.0}
    scores = [
        flat_scores(*(None if t is None else memory_order(t, layout) for t in pair), kind, options)
        for *pair, layout in zip(values, other, layouts, strict=True)
    ]
    total = sum(score.size for score in scores)
    k = draw(st.one_of(st.integers(0, total), st.sampled_from((0, total))))
    placed = arena.place_each(values, layouts)
    others = [arena.place(o, draw(layouts_of(o.dim()))) for o in other if o is not None]
    bits, counts = ops.top_bits(placed, k, other=others, score=kind, **options)
    expected = oracles.top(scores, k)
    assert counts.tolist() == [int(mask.sum()) for mask in expected] and counts.sum() == k
    assert [word.tolist() for word in bits] == [oracles.pack(mask) for mask in expected]
    arena.check()


@layout_cases
def test_layouts(shape: tuple[int, ...], layout: Layout, arena: Arena, rng: torch.Generator) -> None:
    for kind in ("value", "product"):
        values, other = with_ties(rng, shape), with_ties(rng, shape)
        others = [arena.place(other)] if kind == "product" else []
        ordered = [memory_order(t, layout) for t in (values, other)]
        scores = flat_scores(ordered[0], ordered[1], kind, OPTIONS)
        for k in {0, values.numel() // 2, values.numel()}:
            bits, counts = ops.top_bits([arena.place(values, layout)], k, other=others, score=kind)
            (expected,) = oracles.top([scores], k)
            assert bits[0].tolist() == oracles.pack(expected) and counts.tolist() == [k]


def test_ties_are_broken_in_memory_order() -> None:
    for layout in (Layout(), TRANSPOSED, Layout(TRANSPOSED.order, gap=3)):
        placed = Arena().place(torch.zeros(3, 5), layout)
        (word,), _ = ops.top_bits([placed], 4)
        assert int(word) == 0b1111
    (word,), _ = ops.top_bits([Arena().place(torch.ones(2, 3, 4, 5), CHANNELS_LAST)], 33)
    assert word.tolist() == [-1, 1, 0, 0]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_a_ratio_with_rounding(dtype: torch.dtype, rng: torch.Generator) -> None:
    """A compiler may fuse multiplication and addition: what is kept may differ from the oracle at the border alone."""
    forget, retain = ([normal(rng, (n,), dtype).square() for n in (20011, 333)] for _ in range(2))
    options = {"eps": 1e-3, "forget_scale": 1 / 13, "retain_scale": 1 / 117}
    k = 5003
    bits, counts = ops.top_bits(forget, k, other=retain, score="ratio", **options)
    assert counts.sum() == k
    mask = torch.cat(ops.unpack_bits(bits, forget))
    pairs = zip(forget, retain, strict=True)
    exact = torch.as_tensor(np.concatenate([flat_scores(f.double(), r.double(), "ratio", options) for f, r in pairs]))
    assert exact[mask].min() >= exact[~mask].max() * (1 - 8 * torch.finfo(dtype).eps)
    # The numbers that ratio_bits compares with gamma: a cut between two of them must give the same mask.
    gamma = float((exact[mask].min() + exact[~mask].max()) / 2)
    if exact[mask].min() > exact[~mask].max() * (1 + 8 * torch.finfo(dtype).eps):
        by_gamma, _ = ops.ratio_bits(forget, retain, gamma=gamma, **options)
        assert all(torch.equal(a, b) for a, b in zip(bits, by_gamma, strict=True))


def test_dtypes_of_one_list_may_differ(rng: torch.Generator) -> None:
    """Scores of float32 tensors are rounded to float32, also beside a float64 tensor, and compared exactly."""
    third = torch.tensor([1 / 3], dtype=torch.float64)
    narrow, half = third.float(), third.bfloat16()
    assert narrow.double() > third and half.double() > narrow.double()
    for order in ((third, narrow, half), (half, third, narrow), (narrow, half, third)):
        for k in range(4):
            expected = oracles.top([t.double().numpy() for t in order], k)
            assert ops.top_bits(order, k)[1].tolist() == [int(mask.sum()) for mask in expected]
    values, other = normal(rng, (999,), torch.float32), normal(rng, (999,), torch.float32)
    alone, _ = ops.top_bits([values], 333, other=[other], score="product")
    beside = torch.zeros(3, dtype=torch.float64)
    among, counts = ops.top_bits([values, beside], 333, other=[other, beside], score="product")
    assert torch.equal(alone[0], among[0]) and counts.tolist() == [333, 0]
    # One float64 operand is enough: this product underflows in float32 and would tie with 0.
    small = torch.tensor([0.0, 1e-30])
    assert int(ops.top_bits([small], 1, other=[small], score="product")[0][0]) == 1
    assert int(ops.top_bits([small], 1, other=[small.double()], score="product")[0][0]) == 2
    zero = torch.zeros(1, dtype=torch.float64)
    bits, _ = ops.top_bits([small, zero], 1, other=[small, zero], score="product")
    assert [int(word) for word in bits] == [1, 0]


def test_many_tiny_tensors(rng: torch.Generator) -> None:
    tensors = [with_ties(rng, (i % 5,), torch.float32) for i in range(700)]
    for k in (0, 1, 333, 700, sum(t.numel() for t in tensors)):
        bits, counts = ops.top_bits(tensors, k)
        expected = oracles.top([t.numpy() for t in tensors], k)
        assert [word.tolist() for word in bits] == [oracles.pack(mask) for mask in expected]
        assert counts.sum() == k


def test_of_nothing() -> None:
    bits, counts = ops.top_bits([], 0)
    assert bits == [] and counts.tolist() == []
    bits, counts = ops.top_bits([torch.zeros(0), torch.zeros(3, 0)], 0)
    assert [word.numel() for word in bits] == [0, 0] and counts.tolist() == [0, 0]


# --- Threads and memory -------------------------------------------------------------------------------------


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("make", ("ties", "equal", "normal"))
def test_threads_do_not_move_the_border_of_ties(make: str, rng: torch.Generator, restore_threads: None) -> None:
    """The border falls into each of the first pieces and onto their borders; a piece is some blocks of 16,384."""
    values = [MAKERS[make](rng, (n,), torch.float32) for n in (16384 * 3, 70, 16384 * 2 + 5)]
    for k in (1, 16383, 16384, 16385, 32768, 40000, 16384 * 3 + 35, 16384 * 5):
        expected = [oracles.pack(mask) for mask in oracles.top([v.numpy() for v in values], k)]
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            bits, _ = ops.top_bits(values, k)
            assert [word.tolist() for word in bits] == expected, (k, threads)


PEAK = Path(__file__).parent / "programs" / "peak_of_top_bits.py"


@pytest.mark.process
@pytest.mark.skipif(PYTHON_BACKEND, reason="the pure-PyTorch operator sorts a copy")
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is in other units elsewhere")
def test_memory_does_not_grow_with_the_list() -> None:
    """64 MB of gradients: their magnitudes, or a sort of them, would be 64 MB and more; bits are 2 MB, counts 1."""
    run = run_program(PEAK, 4_000_000, check=True)
    assert int(run.stdout) <= 8 * 1024, f"{run.stdout} KiB more at the peak"


def test_operands_are_only_read(rng: torch.Generator) -> None:
    values, other = normal(rng, (1000,)), normal(rng, (1000,))
    before = values.clone(), other.clone()
    for kind in ops.SCORES:
        ops.top_bits([values], 10, other=[other] if kind in ("product", "ratio") else (), score=kind)
    assert same_bits(values, before[0]) and same_bits(other, before[1])


def test_weights_that_require_grad_are_only_read() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -3.0]))
    bits, counts = ops.top_bits([weight], 1, other=[weight], score="product")
    assert int(bits[0]) == 2 and not counts.requires_grad


def test_masks_work_in_a_step(rng: torch.Generator) -> None:
    weight, gradient = torch.zeros(100), normal(rng, (100,), torch.float32)
    bits, _ = ops.top_bits([gradient], 25, score="magnitude")
    scalars = ops.scalars(lr=1.0)
    ops.step_([weight], rule="sgd", scalars=scalars, forget_grads=[gradient], bits=bits, protect=True)
    assert int((weight != 0).sum()) == 25
    assert gradient[weight != 0].abs().min() > gradient[weight == 0].abs().max()
