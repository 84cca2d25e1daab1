"""Operators give the same bits in whatever state the process is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.layouts import coin, normal, same_bits
from helpers.process_state import STATES, Around
from torch import Tensor

from unlearn_ext import ops

SHAPES = ((5, 7), (), (40,), (0, 3))


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [normal(rng, shape, dtype) for shape in SHAPES]


def bits() -> list[Tensor]:
    rng = torch.Generator().manual_seed(9)
    return ops.pack_bits([coin(rng, shape) for shape in SHAPES])


Call = Callable[[], list[Tensor]]


def step(rule: str, dtype: torch.dtype = torch.float32, **options: Any) -> Call:
    weights = tensors(0, dtype)
    slow, first = tensors(1), tensors(2)
    second = [t.abs() for t in tensors(3)]
    forget, retain, words, lr = tensors(4), tensors(5, torch.bfloat16), bits(), torch.tensor(0.1)

    def call() -> list[Tensor]:
        scalars = ops.scalars(lr=lr, momentum=0.9, step=3, weight_decay=0.01, slow_rate=0.5, device="cpu")
        moments = {"first_moments": first, "second_moments": second if rule == "adamw" else ()}
        gradients = {"forget_grads": forget, "retain_grads": retain}
        ops.step_(weights, rule=rule, scalars=scalars, slow=slow, bits=words, **gradients, **moments, **options)
        return [*weights, *slow, *first, *second]

    return call


def fisher() -> Call:
    sums, gradients = tensors(6), tensors(7)

    def call() -> list[Tensor]:
        ops.accumulate_fisher_(sums, gradients, 0.3)
        return sums

    return call


def update() -> Call:
    weights, forget, words = [t.requires_grad_() for t in tensors(0)], tensors(4), bits()
    rate = torch.tensor(0.1, requires_grad=True)

    def call() -> list[Tensor]:
        with torch.inference_mode(False), torch.enable_grad():  # as the user has to, who wants a graph
            results = ops.update(weights, lr=rate, forget_grads=forget, bits=words, weight_decay=0.1)
            loss = sum((t.double() ** 3).sum() for t in results)
            gradients = torch.autograd.grad(loss, [*weights, rate], create_graph=True)
            second = torch.autograd.grad(gradients[-1], [*weights, rate])
        return [t.detach() for t in (*results, *gradients, *second)]

    return call


def products() -> Call:
    operands = tensors(0), tensors(1, torch.float16), bits()
    return lambda: [ops.gradient_products(*operands, "all")]


def selected(select: Callable[..., Any], *operands: Any, **options: Any) -> Call:
    def call() -> list[Tensor]:
        words, counts = select(*operands, **options)
        return [*words, counts]

    return call


def unpacked() -> Call:
    words, like = bits(), tensors(0)
    return lambda: [*ops.unpack_bits(words, like), ops.count_bits(words), *ops.pack_bits([t > 0 for t in like])]


# Each makes its operands, and returns the call to be made in the state of the process.
CALLS: dict[str, Callable[[], Call]] = {
    "step momentum": lambda: step("momentum"),
    "step adamw": lambda: step("adamw", mask_scope="all", protect=True),
    "step rounded": lambda: step("momentum", torch.bfloat16, rounding_seed=3),
    "products": products,
    "fisher": fisher,
    "ratio": lambda: selected(ops.ratio_bits, [t.abs() for t in tensors(0)], [t.abs() for t in tensors(1)]),
    "top": lambda: selected(ops.top_bits, tensors(0, torch.bfloat16), 13, score="magnitude"),
    "top ratio": lambda: selected(ops.top_bits, tensors(0), 13, other=tensors(1), score="ratio"),
    "unpack": unpacked,
    "nothing": lambda: lambda: [ops.ratio_bits([], [])[1], ops.top_bits([], 0)[1], ops.count_bits([])],
    "update": update,
}


@pytest.mark.parametrize("around", STATES.values(), ids=STATES.keys())
@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS.keys())
def test_operators_do_not_depend_on_the_process(make: Callable[[], Call], around: Around) -> None:
    expected, call = make()(), make()
    with around():
        got = call()
    assert len(got) == len(expected)
    for a, b in zip(expected, got, strict=True):
        assert b.device.type == "cpu" and same_bits(a, b)


def test_a_step_in_inference_mode_bumps_the_version_of_a_plain_weight() -> None:
    weight = torch.ones(3)
    with torch.inference_mode():
        before = weight._version
        ops.step_([weight], rule="sgd", scalars=ops.scalars(lr=0.1), retain_grads=[torch.ones(3)])
    assert weight._version > before
    x = torch.ones(3, requires_grad=True)
    loss = (x * weight).sum()
    with torch.inference_mode():
        ops.step_([weight], rule="sgd", scalars=ops.scalars(lr=0.1), retain_grads=[torch.ones(3)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_a_quantised_tensor_is_refused() -> None:
    quantised = torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.quint8)
    with pytest.raises(RuntimeError, match=r"^gradient_products: forget_grads\[0\]: expected .*, got torch.quint8$"):
        ops.gradient_products([quantised])
