"""update: hand-computed numbers, gradcheck, a plain PyTorch transcription, compilation, unrolled hypergradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import oracles
import pytest
import torch
from conftest import (
    CHANNELS_LAST,
    CONTIGUOUS,
    DTYPES,
    MISALIGNED,
    PYTHON_BACKEND,
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
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from unlearn_ext import ops

SCALARS = {
    "lr": 0.3,
    "forget_weight": 0.7,
    "retain_weight": 1.3,
    "forget_clip": 0.45,
    "retain_clip": 0.9,
    "weight_decay": 0.2,
    "slow_rate": 0.35,
}
LISTS = ("weights", "slow", "forget_grads", "retain_grads")
# Which lists a call has besides the weights.
PARTS = {
    "forget": ("forget_grads",),
    "retain": ("retain_grads",),
    "both": ("forget_grads", "retain_grads"),
    "forget-slow": ("forget_grads", "slow"),
    "retain-slow": ("retain_grads", "slow"),
    "both-slow": ("forget_grads", "retain_grads", "slow"),
    "slow": ("slow",),
}
parts_cases = pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
mask_cases = pytest.mark.parametrize("mask_scope", (None, "forget", "all"))

Operands = dict[str, list[Tensor]]


def new_operands(
    rng: torch.Generator,
    shapes: Sequence[Sequence[int]],
    parts: Sequence[str] = LISTS,
    dtype: torch.dtype = torch.float64,
    **dtypes: torch.dtype,
) -> Operands:
    """Contiguous operands of one call; `dtypes` names those of lists that differ from the weights'."""
    dtypes = {"slow": opmath(dtype)} | dtypes
    return {
        name: [normal(rng, shape, dtypes.get(name, dtype)) for shape in shapes]
        for name in LISTS
        if name == "weights" or name in parts
    }


def followed(operands: Operands) -> Operands:
    return {name: [tensor.detach().requires_grad_() for tensor in tensors] for name, tensors in operands.items()}


def new_scalars() -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in SCALARS.items()}


def flat(operands: Operands) -> list[Tensor]:
    return [tensor for tensors in operands.values() for tensor in tensors]


def call(operands: Operands, bits: Sequence[Tensor] = (), mask_scope: str | None = None, **scalars: Any) -> list:
    return ops.update(**operands, bits=bits, mask_scope=mask_scope or "forget", **scalars)


def transcription(
    operands: Operands, masks: Sequence[Tensor] = (), mask_scope: str | None = None, **scalars: Any
) -> list[Tensor]:
    rows = [
        [operands[name][i] if name in operands else None for name in LISTS] for i in range(len(operands["weights"]))
    ]
    masks = masks or [None] * len(rows)
    return [
        oracles.update(*row, mask, mask_scope or "forget", **scalars) for row, mask in zip(rows, masks, strict=True)
    ]


# --- Numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_hand_computed(dtype: torch.dtype) -> None:
    # Kept: g = 3·0.5·2 + 0.5 = 3.5, θ' = 1 - 0.1·(3.5 + 0.2·1) = 0.63; not kept: g = 0.5, θ' = 0.93.
    # Then 0.9 + 0.5·(θ' - 0.9) = 0.765 and 0.915.
    values = {"weights": 1.0, "forget_grads": 2.0, "retain_grads": 0.5, "slow": 0.9}
    operands = followed({name: [torch.full((2,), value, dtype=dtype)] for name, value in values.items()})
    scalars = {"lr": 0.1, "weight_decay": 0.2, "forget_weight": 3.0, "forget_clip": 0.5, "slow_rate": 0.5}
    scalars = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in scalars.items()}
    bits = ops.pack_bits([torch.tensor([True, False])])
    (result,) = call(operands, bits, **scalars)
    assert result.dtype == dtype
    assert_ulps(result.detach(), [0.765, 0.915], 4)

    # Of the first plus 10 times the second. For the weights 0.5·(1 - 0.1·0.2) = 0.49; for the slow ones 0.5; for the
    # gradients -0.1·0.5·1.5 = -0.075 where the forget gradient is kept, and -0.1·0.5 = -0.05.
    (result @ torch.tensor([1.0, 10.0], dtype=dtype)).backward()
    expected = {
        "weights": [0.49, 4.9],
        "slow": [0.5, 5.0],
        "forget_grads": [-0.075, 0.0],
        "retain_grads": [-0.05, -0.5],
    }
    for name, want in expected.items():
        assert_ulps(operands[name][0].grad, want, 4)
    # lr: -0.5·(3.7 + 10·0.7); weight decay: -0.05·(1 + 10); forget weight and clip: -0.05·2 times the other;
    # slow rate: 0.63 - 0.9 + 10·(0.93 - 0.9).
    expected = {"lr": -5.35, "weight_decay": -0.55, "forget_weight": -0.05, "forget_clip": -0.3, "slow_rate": 0.03}
    for name, want in expected.items():
        # Of operands that float32 rounds: 0.9 is one.
        torch.testing.assert_close(scalars[name].grad.item(), want, rtol=0, atol=1e-14 if dtype.itemsize == 8 else 1e-6)


@mask_cases
@parts_cases
def test_is_the_plain_step(parts: Sequence[str], mask_scope: str | None, rng: torch.Generator) -> None:
    """Bit by bit what step_ writes, from operands that stay as they are and share no memory with the results."""
    shapes = ((), (0,), (31,), (5, 200), (17000,))
    for dtype in DTYPES:
        operands = new_operands(rng, shapes, parts, dtype)
        before = [tensor.clone() for tensor in flat(operands)]
        bits = ops.pack_bits([coin(rng, shape) for shape in shapes]) if mask_scope else []
        results = call(operands, bits, mask_scope, **SCALARS)
        assert all(same_bits(a, b) for a, b in zip(before, flat(operands), strict=True))
        taken = {tensor.data_ptr() for tensor in flat(operands) if tensor.numel()}
        assert all(result.numel() == 0 or result.data_ptr() not in taken for result in results)
        ops.step_(**operands, rule="sgd", bits=bits, mask_scope=mask_scope or "forget", scalars=ops.scalars(**SCALARS))
        assert all(same_bits(a, b) for a, b in zip(results, operands["weights"], strict=True))


def test_steps_of_nothing_are_new_tensors(rng: torch.Generator) -> None:
    (weight,) = weights = [normal(rng, (40,))]
    (result,) = ops.update(weights, lr=0.0, retain_grads=weights)
    assert same_bits(result, weight) and result.data_ptr() != weight.data_ptr()
    assert ops.update([], lr=0.1) == []


# --- Gradients ----------------------------------------------------------------------------------------------


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


@mask_cases
@parts_cases
def test_second_derivatives(parts: Sequence[str], mask_scope: str | None, rng: torch.Generator) -> None:
    """Through the derivative, which is made of ordinary operations then, whatever the kernels: a few weights do."""
    function, inputs = as_function(rng, ((), (0,), (2, 3)), parts, mask_scope)
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


# --- In a graph ---------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """The names of this package's operators, in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "unlearn_ext":
            self.calls.append((func._opname, args))
        return func(*args, **kwargs or {})


def test_twice_in_a_graph(rng: torch.Generator) -> None:
    """Gradients add up, whether the same operands are used again or one step follows another."""
    shapes = ((33,), (4, 5))
    operands, scalars = new_operands(rng, shapes), new_scalars()
    masks = [coin(rng, shape) for shape in shapes]

    def losses(step: Callable[..., list[Tensor]], words: Sequence[Tensor]) -> tuple[Tensor, ...]:
        mine = followed(operands)
        first = step(mine, words, **scalars)
        second = step(mine, words, **{**scalars, "lr": scalars["lr"] * 2})
        third = step({**mine, "weights": first, "slow": second}, words, **scalars)
        loss = sum((a.sin() * b * c).sum() for a, b, c in zip(first, second, third, strict=True))
        return (loss, *torch.autograd.grad(loss, [*flat(mine), *scalars.values()]))

    for got, want in zip(losses(call, ops.pack_bits(masks)), losses(transcription, masks), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_one_tensor_in_several_roles(rng: torch.Generator) -> None:
    weight = normal(rng, (50,)).requires_grad_()
    roles = {name: [weight] for name in LISTS}
    for create_graph in (False, True):
        pair = []
        for step in (call, transcription):
            (result,) = step(roles, **SCALARS)
            pair += torch.autograd.grad(result.square().sum(), weight, create_graph=create_graph)
        torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-13)


def test_backward_is_one_call_and_only_for_what_is_needed(rng: torch.Generator) -> None:
    operands = new_operands(rng, ((40,), (3,)))
    lr = torch.tensor(0.1, requires_grad=True)
    operands["forget_grads"][1].requires_grad_()
    results = call(operands, lr=lr)
    with Calls() as mode:
        sum(result.sum() for result in results).backward()
    ((name, args),) = mode.calls
    assert name == "update_backward"
    assert args[-5:] == (False, False, True, False, True)  # weights, slow, forget, retain, scalars
    assert lr.grad is not None and operands["forget_grads"][1].grad is not None
    assert all(tensor.grad is None for tensor in flat(operands) if not tensor.requires_grad)

    # Nobody asked for a scalar's gradient: none is summed.
    (weight,) = followed({"weights": [operands["weights"][0]]})["weights"]
    with Calls() as mode:
        ops.update([weight], lr=0.1, retain_grads=[operands["retain_grads"][0]])[0].sum().backward()
    assert mode.calls[-1][1][-5:] == (True, False, False, False, False)
    assert torch.equal(weight.grad, torch.ones(40, dtype=torch.float64))


def test_without_gradients_nothing_is_recorded(rng: torch.Generator) -> None:
    operands = new_operands(rng, ((40,),))
    assert not call(operands, **SCALARS)[0].requires_grad
    with torch.no_grad():
        assert not call(followed(operands), **SCALARS)[0].requires_grad
    with torch.inference_mode():
        assert call(operands, **SCALARS)[0].is_inference()


def test_an_operand_changed_before_backward_is_an_error(rng: torch.Generator) -> None:
    operands = new_operands(rng, ((40,),))
    (result,) = call(followed(operands), **SCALARS)
    ops.step_(operands["weights"], rule="sgd", scalars=ops.scalars(lr=0.1), retain_grads=operands["retain_grads"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_scalars_of_any_dtype_and_place_in_the_graph(dtype: torch.dtype, rng: torch.Generator) -> None:
    """Their gradients come back in their own dtype, through whatever they were computed from."""
    operands = new_operands(rng, ((40,),))
    rate = torch.tensor([0.5], dtype=dtype, requires_grad=True)
    results = [step(operands, lr=(rate * 0.5).double().sum())[0].sum() for step in (call, transcription)]
    assert_ulps(*(torch.autograd.grad(result, rate)[0] for result in results), 0)
    leaf = torch.tensor(0.25, dtype=dtype, requires_grad=True)
    call(operands, lr=leaf)[0].sum().backward()
    assert leaf.grad.dtype == dtype and leaf.grad.shape == ()


# --- opcheck and torch.compile ------------------------------------------------------------------------------


@mask_cases
@parts_cases
def test_opcheck(parts: Sequence[str], mask_scope: str | None, rng: torch.Generator) -> None:
    """With gradients, so that the derivative's registration and its fake are checked as well."""
    shapes = ((5, 7), (33,), (), (0,))
    operands = followed(new_operands(rng, shapes, parts, torch.float32, forget_grads=torch.bfloat16))
    bits = ops.pack_bits([coin(rng, shape) for shape in shapes]) if mask_scope else []
    with Calls() as mode:
        results = call(operands, bits, mask_scope, **new_scalars())
        torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    assert [name for name, _ in mode.calls] == ["update", "update_backward"]
    for name, args in mode.calls:
        args = tree_map_only(Tensor, torch.Tensor.detach, args)
        if name == "update":  # the derivative is not called where one of its own is needed
            tree_map_only(Tensor, lambda t: t.requires_grad_(t.is_floating_point()), args)
        torch.library.opcheck(getattr(torch.ops.unlearn_ext, name).default, args)


def functional_step(operands: Operands, bits: Sequence[Tensor], scalars: dict[str, Tensor]) -> list[Tensor]:
    doubled = [weight * 2 for weight in operands["weights"]]
    moved = ops.update(**{**operands, "weights": doubled}, bits=bits, **scalars)
    return [result.sin() for result in moved]


def in_place_step(operands: Operands, bits: Sequence[Tensor], scalars: Tensor) -> list[Tensor]:
    doubled = [weight * 2 for weight in operands["weights"]]
    ops.step_(**{**operands, "weights": doubled}, rule="sgd", bits=bits, scalars=scalars)
    return [result.sin() for result in doubled]


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param("inductor", marks=pytest.mark.skipif(PYTHON_BACKEND, reason="inductor needs a compiler")),
    ],
)
def test_compiles_functional_and_in_place(backend: str, rng: torch.Generator) -> None:
    """One graph each, forward and backward, with the fused backward in it."""
    shapes = ((5, 7), (33,))
    operands = new_operands(rng, shapes)
    bits = ops.pack_bits([coin(rng, shape) for shape in shapes])
    torch._dynamo.reset()
    compiled = torch.compile(functional_step, fullgraph=True, backend=backend)
    outcomes = []
    for step in (functional_step, compiled):
        mine, scalars = followed(operands), new_scalars()
        results = step(mine, bits, scalars)
        with Calls() as mode:
            gradients = torch.autograd.grad(sum(r.sum() for r in results), [*flat(mine), *scalars.values()])
        assert [name for name, _ in mode.calls] == ["update_backward"]
        outcomes.append([*results, *gradients])
    for got, want in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)

    packed = ops.scalars(**SCALARS)
    in_place = torch.compile(in_place_step, fullgraph=True, backend=backend)(operands, bits, packed)
    for got, want in zip(in_place, outcomes[0], strict=False):
        torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-12)


def test_a_compiled_update_takes_new_numbers(rng: torch.Generator) -> None:
    """Neither a float nor a tensor among the scalars is baked into the graph."""
    operands = new_operands(rng, ((40,),))
    torch._dynamo.reset()
    compiled = torch.compile(lambda **scalars: call(operands, **scalars)[0], fullgraph=True, backend="aot_eager")
    for lr in (0.1, 0.02, 0.3):
        for weight in (0.5, torch.tensor(lr)):
            options = {"lr": lr, "forget_weight": weight}
            assert same_bits(compiled(**options), call(operands, **options)[0])


# --- Through unrolled steps ---------------------------------------------------------------------------------


class Problem:
    """A small network in float64 that unlearns one batch in k = 3 joint steps, closed by an interpolation."""

    def __init__(self, rng: torch.Generator) -> None:
        self.start = [0.5 * normal(rng, shape) for shape in ((6, 5), (6,), (3, 6), (3,))]
        self.bits = ops.pack_bits([coin(rng, weight.shape, 0.7) for weight in self.start])
        batches = [(normal(rng, (20, 5)), torch.randint(3, (20,), generator=rng)) for _ in range(3)]
        self.forget, self.retain, self.held_out = batches

    def loss(self, weights: Sequence[Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        first, first_bias, second, second_bias = weights
        hidden = torch.tanh(functional.linear(batch[0], first, first_bias))
        return functional.cross_entropy(functional.linear(hidden, second, second_bias), batch[1])

    def __call__(self, forget_alpha: Tensor, lr: Tensor, second_order: bool = True) -> Tensor:
        """The held-out loss after the steps. Without `second_order` the gradients count as given."""
        weights = [weight.clone().requires_grad_() for weight in self.start]
        for step in range(3):
            grads = {}
            for name, sign, batch in (("forget_grads", -1, self.forget), ("retain_grads", 1, self.retain)):
                loss = sign * self.loss(weights, batch)
                grads[name] = torch.autograd.grad(loss, weights, create_graph=second_order)
            closing = {"slow": self.start, "slow_rate": 0.8} if step == 2 else {}
            options = {"weight_decay": 0.01, "retain_weight": 0.9, **grads, **closing}
            weights = ops.update(weights, lr=lr, forget_weight=forget_alpha, bits=self.bits, **options)
        return self.loss(weights, self.held_out)


def central_difference(function: Callable[[float], float], at: float, width: float = 1e-4) -> float:
    return (function(at + width) - function(at - width)) / (2 * width)


def test_hypergradient_through_three_steps(rng: torch.Generator) -> None:
    problem = Problem(rng)
    forget_alpha, lr = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.6, 0.5))
    with Calls() as mode:
        gradients = torch.autograd.grad(problem(forget_alpha, lr), (forget_alpha, lr))
    assert [name for name, _ in mode.calls] == ["update"] * 3 + ["update_backward"] * 3

    def value(alpha: float, rate: float) -> float:
        return problem(torch.tensor(alpha, dtype=torch.float64), torch.tensor(rate, dtype=torch.float64)).item()

    expected = (
        central_difference(lambda alpha: value(alpha, lr.item()), forget_alpha.item()),
        central_difference(lambda rate: value(forget_alpha.item(), rate), lr.item()),
    )
    first_order = torch.autograd.grad(problem(forget_alpha, lr, second_order=False), (forget_alpha, lr))
    for got, want, without in zip(gradients, expected, first_order, strict=True):
        assert abs(got.item() / want - 1) < 1e-5
        assert abs(without.item() / want - 1) > 1e-2, "second-order terms do not matter here: choose another problem"


def test_second_derivative_through_three_steps(rng: torch.Generator) -> None:
    """The curvature in the strength of forgetting: the derivative's own derivative, by create_graph."""
    problem = Problem(rng)

    def slope(alpha: Tensor, **options: bool) -> Tensor:
        return torch.autograd.grad(problem(alpha, torch.tensor(0.5)), alpha, **options)[0]

    alpha = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    (curvature,) = torch.autograd.grad(slope(alpha, create_graph=True), alpha)
    want = central_difference(lambda a: slope(torch.tensor(a, dtype=torch.float64, requires_grad=True)).item(), 0.6)
    assert abs(curvature.item() / want - 1) < 1e-5


# --- Determinism --------------------------------------------------------------------------------------------


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_every_thread_count(dtype: torch.dtype, restore_threads: None, rng: torch.Generator) -> None:
    shapes = (*((n,) for n in range(1, 200, 23)), (100001,), (40, 1001))
    operands = followed(new_operands(rng, shapes, LISTS, dtype))
    bits = ops.pack_bits([coin(rng, shape) for shape in shapes])
    outcomes = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        scalars = new_scalars()
        results = call(operands, bits, **scalars)
        grads = torch.autograd.grad(results, [*flat(operands), *scalars.values()], [r.detach() for r in results])
        outcomes.append([*results, *grads])
    for other in outcomes[1:]:
        assert all(same_bits(a, b) for a, b in zip(outcomes[0], other, strict=True))
