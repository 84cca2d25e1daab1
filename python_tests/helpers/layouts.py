"""What the operator tests share: memory layouts in poisoned buffers, distances in ulps, hypothesis strategies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

SEED = 20240919
RULES = ("sgd", "momentum", "adam", "adamw")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def opmath(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- Layouts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where the elements of a shape lie: dimensions from outermost to innermost, gap between neighbours, offset.

    `order=None` is the logical order. An odd `offset` misaligns the first element for vector loads.
    """

    order: tuple[int, ...] | None = None
    gap: int = 1
    offset: int = 0

    def strides(self, shape: Sequence[int]) -> list[int]:
        strides, next_stride = [0] * len(shape), self.gap
        for d in reversed(self.order if self.order is not None else range(len(shape))):
            strides[d] = next_stride
            next_stride *= max(shape[d], 1)
        return strides


CONTIGUOUS = Layout()
CHANNELS_LAST = Layout(order=(0, 2, 3, 1))
TRANSPOSED = Layout(order=(1, 0))
STRIDED = Layout(gap=2)
MISALIGNED = Layout(offset=1)

LAYOUTS = {
    "0-d": ((), CONTIGUOUS),
    "empty": ((0,), CONTIGUOUS),
    "empty-3d": ((3, 0, 2), CONTIGUOUS),
    "1": ((1,), CONTIGUOUS),
    "31": ((31,), CONTIGUOUS),
    "32": ((32,), CONTIGUOUS),
    "33": ((33,), MISALIGNED),
    "1000": ((1000,), CONTIGUOUS),
    "100003": ((100003,), MISALIGNED),
    "channels_last": ((5, 7, 3, 3), CHANNELS_LAST),
    "channels_last-offset": ((4, 3, 5, 5), Layout(order=(0, 2, 3, 1), offset=3)),
    "transposed": ((37, 53), TRANSPOSED),
    "strided": ((9, 41), STRIDED),
    "strided-transposed": ((13, 17), Layout(order=(1, 0), gap=3, offset=1)),
    "0-d-offset": ((), MISALIGNED),
}
layout_cases = pytest.mark.parametrize("shape, layout", LAYOUTS.values(), ids=LAYOUTS.keys())

_POISON = 0xFF  # NaN in every floating dtype, every bit set in an integer
_GUARD = 64


class Arena:
    """Tensors inside poisoned buffers: whatever is no element must neither be read nor written."""

    def __init__(self) -> None:
        self._placed: list[tuple[Tensor, Tensor]] = []

    def place(self, values: Tensor, layout: Layout = CONTIGUOUS) -> Tensor:
        """A copy of `values` in the given layout."""
        shape, strides = values.shape, layout.strides(values.shape)
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if values.numel() else 0
        count = span + 2 * _GUARD + layout.offset
        raw = torch.full((count * values.element_size(),), _POISON, dtype=torch.uint8)
        view = raw.view(values.dtype).as_strided(shape, strides, _GUARD + layout.offset)
        view.copy_(values)
        self._placed.append((raw, view))
        return view

    def place_each(self, values: Iterable[Tensor], layouts: Iterable[Layout]) -> list[Tensor]:
        return [self.place(value, layout) for value, layout in zip(values, layouts, strict=True)]

    def check(self) -> None:
        for raw, view in self._placed:
            free = torch.ones(raw.numel() // view.element_size(), dtype=torch.bool)
            free.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
            stray = (raw.view(-1, view.element_size())[free] != _POISON).sum()
            assert stray == 0, f"{stray} bytes written outside of {tuple(view.shape)} {view.stride()}"


@st.composite
def shapes_and_layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], Layout]:
    """Any order of dimensions, gaps and offsets; sizes around the borders of words, strips and blocks."""
    if draw(st.booleans()):
        shape = (draw(st.sampled_from((1, 2, 31, 32, 33, 63, 64, 65, 255, 256, 257, 1023, 16384, 16417))),)
    else:
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    return shape, draw(layouts_of(len(shape)))


@st.composite
def layouts_of(draw: st.DrawFn, dimensions: int) -> Layout:
    return Layout(
        order=tuple(draw(st.permutations(range(dimensions)))),
        gap=draw(st.sampled_from((1, 1, 2, 3))),
        offset=draw(st.integers(0, 3)),
    )


def memory_order(values: Tensor, layout: Layout) -> Tensor:
    """The elements, flat, in the order in which `layout` stores them."""
    return values.permute(layout.order if layout.order is not None else tuple(range(values.dim()))).reshape(-1)


# --- Numbers ------------------------------------------------------------------------------------------------


def normal(rng: torch.Generator, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(tuple(shape), generator=rng, dtype=torch.float64).to(dtype)


def coin(rng: torch.Generator, shape: Sequence[int], probability: float = 0.5) -> Tensor:
    return torch.rand(tuple(shape), generator=rng) < probability


def ulps(got: Tensor, want: object, scale: object | None = None) -> Tensor:
    """|got - want| in units in the last place of got's dtype at magnitude `scale` (default: the larger of both).

    NaN equals NaN and an infinity itself; every other pair with a NaN or an infinity is infinitely far apart.
    """
    a, b = got.double(), torch.as_tensor(want, dtype=torch.float64)
    magnitude = torch.maximum(a.abs(), b.abs()) if scale is None else torch.as_tensor(scale, dtype=torch.float64)
    info = torch.finfo(got.dtype)
    exponent = np.frexp(magnitude.numpy())[1] - 1
    unit = torch.as_tensor(np.maximum(np.ldexp(info.eps, exponent), info.smallest_normal * info.eps))
    distance = (a - b).abs() / unit
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, torch.where(distance.isfinite(), distance, math.inf))


def assert_ulps(got: Tensor, want: object, limit: float, scale: object | None = None) -> None:
    distance = ulps(got, want, scale)
    worst = distance.max().item() if distance.numel() else 0.0
    assert worst <= limit, f"{worst:.3g} ulp of {got.dtype}, at most {limit} allowed"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of representations: tells -0 from 0 and one NaN from another."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat_a, flat_b = (t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (a, b))
    return torch.equal(flat_a, flat_b)
