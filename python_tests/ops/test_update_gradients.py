"""update's gradients: gradcheck, a plain PyTorch transcription, dtypes, layouts, what is not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from helpers.layouts import (
    CHANNELS_LAST,
    CONTIGUOUS,
    DTYPES,
    MISALIGNED,
    STRIDED,
    TRANSPOSED,
    Arena,
    Layout,
    assert_ulps,
    coin,
    layout_cases,
    normal,
    opmath,
    same_bits,
    shapes_and_layouts,
)
from helpers.updates import (
    LISTS,
    PARTS,
    Operands,
    call,
    flat,
    followed,
    mask_cases,
    new_operands,
    new_scalars,
    parts_cases,
    transcription,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unlearn_ext import ops


def as_function(
    rng: torch.Generator, shapes: Sequence[Sequence[int]], parts: Sequence[str], mask_scope: str | None
) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A call as a function of weights, slow weights, gradients and all scalars, and a place to look at it."""
    operands, scalars = followed(new_operands(rng, shapes, parts)), new_scalars()
    bits = ops.pack_bits([coin(rng, shape) for shape in shapes]) if mask_scope else []

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(inputs)
        lists = {name: [next(remaining) for _ in shapes] for name in operands}
        return tuple(call(lists, bits, mask_scope, **dict(zip(scalars, remaining, strict=True))))

    return function, (*flat(operands), *scalars.values())


@mask_cases
@parts_cases
def test_gradcheck(parts: Sequence[str], mask_scope: str | None, rng: torch.Generator) -> None:
    function, inputs = as_function(rng, ((), (3,), (0,), (2, 17)), parts, mask_scope)
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.slow
@pytest.mark.native_only
@mask_cases
@parts_cases
def test_second_derivatives(parts: Sequence[str], mask_scope: str | None, rng: torch.Generator) -> None:
    """Through the derivative, which is made of ordinary operations then, whatever the kernels: a few weights do."""
    function, inputs = as_function(rng, ((), (0,), (3,)), parts, mask_scope)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(
    "shape, layout",
    [((5, 3, 2, 2), CHANNELS_LAST), ((7, 5), TRANSPOSED), ((3, 11), STRIDED), ((33,), MISALIGNED)],
    ids=("channels_last", "transposed", "strided", "misaligned"),
)
def test_gradcheck_in_other_layouts(shape: tuple[int, ...], layout: Layout, arena: Arena, rng: torch.Generator) -> None:
    """Operands in differing layouts, and a gradient of the result in another one still."""
    layouts = dict(zip(LISTS, (layout, CONTIGUOUS, layout, Layout(gap=2)), strict=True))
    operands = new_operands(rng, [shape])
    placed = {name: [arena.place(tensors[0], layouts[name]).requires_grad_()] for name, tensors in operands.items()}
    scalars = new_scalars()
    bits = ops.pack_bits([arena.place(coin(rng, shape), layout)])

    def function(*inputs: Tensor) -> Tensor:
        lists = {name: [tensor] for name, tensor in zip(LISTS, inputs, strict=False)}
        (result,) = call(lists, bits, **dict(zip(scalars, inputs[len(LISTS) :], strict=True)))
        assert result.stride() == torch.empty_like(inputs[0]).stride()
        return result.transpose(0, -1).contiguous()

    assert torch.autograd.gradcheck(function, (*flat(placed), *scalars.values()))


def assert_gradients(
    operands: Operands,
    masks: Sequence[Tensor] = (),
    mask_scope: str | None = None,
    bits: Sequence[Tensor] | None = None,
    seed: int = 7,
) -> None:
    """Results and gradients against autograd of the transcription, which runs in float64.

    Operands are read in the opmath type. Rounding: 8 ulp of it, of half types half an ulp more. Scalars' sums are
    exact to the last bits of the sum of their magnitudes.
    """
    wide_operands = {
        name: [t.to(opmath(w.dtype)).double() for t, w in zip(tensors, operands["weights"], strict=True)]
        for name, tensors in operands.items()
    }
    wide_operands, wide_scalars = followed(wide_operands), new_scalars()
    expected = transcription(wide_operands, masks, mask_scope, **wide_scalars)
    operands, scalars = followed(operands), new_scalars()
    results = call(operands, ops.pack_bits(masks) if bits is None else bits, mask_scope, **scalars)
    rng = torch.Generator().manual_seed(seed)
    output_grads = [normal(rng, result.shape, result.dtype) for result in results]
    got = torch.autograd.grad(results, [*flat(operands), *scalars.values()], output_grads)
    inputs = [*flat(wide_operands), *wide_scalars.values()]
    want = torch.autograd.grad(expected, inputs, [d.double() for d in output_grads], materialize_grads=True)

    count = len(flat(operands))
    weights = [weight for _ in operands for weight in operands["weights"]]
    for result, weight, wanted in zip(results, operands["weights"], expected, strict=True):
        assert result.dtype == weight.dtype
        limit = 8 if result.dtype == opmath(result.dtype) else 0.51
        assert_ulps(result.detach(), wanted.detach(), limit, wanted.detach().abs() + 3)
    for gradient, tensor, weight, wanted in zip(got[:count], flat(operands), weights, want[:count], strict=True):
        assert gradient.dtype == tensor.dtype and gradient.shape == tensor.shape
        wide = opmath(weight.dtype)
        narrow = torch.finfo(tensor.dtype).eps > torch.finfo(wide).eps
        assert_ulps(gradient if narrow else gradient.to(wide), wanted, 0.51 if narrow else 8)
    magnitude = sum((d.double().abs() * 10).sum().item() for d in output_grads)
    for name, gradient, wanted in zip(scalars, got[count:], want[count:], strict=True):
        assert abs(gradient - wanted) <= 1e-13 * (magnitude + 1), f"{name}: {gradient} instead of {wanted}"


@mask_cases
@parts_cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_a_plain_transcription(
    dtype: torch.dtype, parts: Sequence[str], mask_scope: str | None, rng: torch.Generator
) -> None:
    shapes = ((), (0,), (31,), (5, 60), (16417,))
    masks = [coin(rng, shape) for shape in shapes] if mask_scope else []
    assert_gradients(new_operands(rng, shapes, parts, dtype), masks, mask_scope)


@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_mix_of_dtypes(dtype: torch.dtype, other: torch.dtype, rng: torch.Generator) -> None:
    shapes = ((45,), (300,))
    masks = [coin(rng, shape) for shape in shapes]
    assert_gradients(new_operands(rng, shapes, LISTS, dtype, forget_grads=other, retain_grads=other), masks)


def test_a_list_may_mix_dtypes(rng: torch.Generator) -> None:
    lists = [new_operands(rng, [(70,)], LISTS, dtype) for dtype in DTYPES]
    assert_gradients({name: [operands[name][0] for operands in lists] for name in LISTS})


@layout_cases
def test_layouts(shape: tuple[int, ...], layout: Layout, arena: Arena, rng: torch.Generator) -> None:
    """The guards around every operand are NaN: one value read beyond it would show in the scalars' gradients."""
    for dtype in DTYPES:
        operands = new_operands(rng, [shape], LISTS, dtype)
        operands = {name: [arena.place(tensors[0], layout)] for name, tensors in operands.items()}
        mask = coin(rng, shape)
        bits = [arena.place(word) for word in ops.pack_bits([arena.place(mask, layout)])]
        assert_gradients(operands, [mask], "all", bits)


@given(st.data())
def test_any_list_in_any_layout(data: st.DataObject) -> None:
    places = data.draw(st.lists(shapes_and_layouts(), min_size=1, max_size=4))
    rng, arena = torch.Generator().manual_seed(data.draw(st.integers(0, 1000))), Arena()
    shapes, layouts = zip(*places, strict=True)
    dtype = data.draw(st.sampled_from(DTYPES))
    operands = new_operands(rng, shapes, data.draw(st.sampled_from(list(PARTS.values()))), dtype)
    operands = {
        name: arena.place_each(tensors, layouts if data.draw(st.booleans()) else [CONTIGUOUS] * len(shapes))
        for name, tensors in operands.items()
    }
    masks = [coin(rng, shape) for shape in shapes]
    # Bits stand in the memory order of the weights, which the draw above has settled.
    bits = ops.pack_bits(
        [torch.empty_like(w, dtype=torch.bool).copy_(m) for w, m in zip(operands["weights"], masks, strict=True)]
    )
    assert_gradients(operands, masks, data.draw(st.sampled_from(("forget", "all"))), bits)
    arena.check()


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("create_graph", (False, True), ids=("fused", "create_graph"))
def test_masked_out_non_finite_gradients_do_not_leak(bad: float, create_graph: bool, rng: torch.Generator) -> None:
    """Neither into results nor into any gradient, those of the scalars included: all are as if it were 0."""
    mask = coin(rng, (100,))
    operands, scalars = followed(new_operands(rng, [(100,)])), new_scalars()
    outcomes = []
    for value in (0.0, bad):
        for name in ("forget_grads", "retain_grads"):
            with torch.no_grad():
                operands[name][0][~mask] = value
        (result,) = call(operands, ops.pack_bits([mask]), "all", **scalars)
        inputs = [*flat(operands), *scalars.values()]
        outcomes.append([result, *torch.autograd.grad(result.sin().sum(), inputs, create_graph=create_graph)])
    assert all(value.isfinite().all() for value in outcomes[1])
    assert all(same_bits(a, b) for a, b in zip(*outcomes, strict=True))
    assert (outcomes[1][3][~mask] == 0).all() and (outcomes[1][4][~mask] == 0).all()


def test_kept_non_finite_gradients_do_show(rng: torch.Generator) -> None:
    operands, scalars = followed(new_operands(rng, [(100,)])), new_scalars()
    with torch.no_grad():
        operands["forget_grads"][0][50] = float("inf")
    (result,) = call(operands, **scalars)
    assert not result[50].isfinite() and result[51:].isfinite().all()
    assert not torch.autograd.grad(result.sum(), scalars["lr"])[0].isfinite()
