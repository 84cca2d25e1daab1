"""What all operators promise: opcheck, version counters, autograd, torch.compile, determinism."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers.layouts import DTYPES, RULES, SEED, Arena, Layout, coin, opmath, same_bits
from helpers.operands import (
    fisher_operands,
    numbers,
    products_operands,
    ratio_operands,
    some_bits,
    step_operands,
    tensors_in,
    top_operands,
    unpack_operands,
    update_operands,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unlearn_ext import ops

# --- opcheck ------------------------------------------------------------------------------------------------


class RawCalls(TorchDispatchMode):
    """Catches the calls of registered operators on their way, so that no test needs to know the raw schemas."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "unlearn_ext":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **kwargs or {})


CHECKED: dict[str, Callable[[], object]] = {
    **{f"step_-{rule}": lambda rule=rule: ops.step_(**step_operands(rule, protect=True)) for rule in RULES},
    "step_-bfloat16": lambda: ops.step_(**step_operands(dtype=torch.bfloat16, rounding_seed=5)),
    "step_-plain": lambda: ops.step_(numbers(), rule="sgd", scalars=ops.scalars(lr=0.1), retain_grads=numbers()),
    "step_-interpolation": lambda: ops.step_(numbers(), rule="adam", scalars=ops.scalars(lr=0.1), slow=numbers()),
    "step_-channels_last": lambda: ops.step_(
        [torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)],
        rule="sgd",
        scalars=ops.scalars(lr=0.1),
        retain_grads=[torch.ones(2, 3, 4, 5)],
    ),
    "gradient_products": lambda: ops.gradient_products(**products_operands()),
    "gradient_products-retain": lambda: ops.gradient_products((), numbers(), mask_scope="all"),
    "accumulate_fisher_": lambda: ops.accumulate_fisher_(**fisher_operands()),
    "ratio_bits": lambda: ops.ratio_bits(**ratio_operands(gamma=2.0)),
    **{f"top_bits-{score}": lambda score=score: ops.top_bits(numbers(), 30, score=score) for score in ops.SCORES[:2]},
    **{f"top_bits-{score}": lambda score=score: ops.top_bits(**top_operands(score=score)) for score in ops.SCORES[2:]},
    "top_bits-channels_last": lambda: ops.top_bits([torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)], 9),
    "pack_bits": lambda: ops.pack_bits([torch.ones(5, 7, dtype=torch.bool).t(), torch.ones(0, dtype=torch.bool)]),
    "unpack_bits": lambda: ops.unpack_bits(**unpack_operands()),
    "unpack_bits-gaps": lambda: ops.unpack_bits(
        [torch.ones(1, dtype=torch.int32)], [Arena().place(torch.zeros(3, 1, 4), Layout((2, 0, 1), gap=2))]
    ),
    "count_bits": lambda: ops.count_bits(some_bits()),
    "update": lambda: ops.update(**update_operands()),
    "update-plain": lambda: ops.update(numbers(torch.bfloat16), lr=0.1, retain_grads=numbers()),
}


# One of each operator, and of step_ what differs most.
QUICK = ("step_-adamw", "step_-bfloat16", "top_bits-product", "gradient_products", "accumulate_fisher_", "ratio_bits")
QUICK += ("pack_bits", "unpack_bits", "count_bits", "update")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CHECKED]
)
def test_opcheck(name: str) -> None:
    with RawCalls() as raw:
        CHECKED[name]()
    assert {call[0].name().split("::")[1] for call in raw.calls} >= {name.split("-")[0]}
    for func, args, kwargs in raw.calls:
        torch.library.opcheck(func, args, kwargs)


# --- Version counters and autograd --------------------------------------------------------------------------


def versions(operands: dict[str, Any], names: Sequence[str]) -> list[int]:
    return [tensor._version for name in names for tensor in operands.get(name, ())]


@pytest.mark.parametrize("rule", RULES)
def test_step_bumps_the_version_of_what_it_mutates(rule: str) -> None:
    operands = step_operands(rule)
    mutated, read = ("weights", "slow", "first_moments", "second_moments"), ("forget_grads", "retain_grads", "bits")
    before, read_before = versions(operands, mutated), versions(operands, read)
    ops.step_(**operands)
    assert all(new > old for old, new in zip(before, versions(operands, mutated), strict=True))
    assert versions(operands, read) == read_before


def test_fisher_bumps_the_version_of_what_it_mutates() -> None:
    operands = fisher_operands()
    before, read_before = versions(operands, ["fisher"]), versions(operands, ["grads"])
    ops.accumulate_fisher_(**operands)
    assert all(new > old for old, new in zip(before, versions(operands, ["fisher"]), strict=True))
    assert versions(operands, ["grads"]) == read_before


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def test_a_weight_saved_for_backward_and_then_moved_is_an_error(compiled: bool) -> None:
    """Otherwise the gradient would silently be that of the moved weight."""

    def move(weight: Tensor, gradient: Tensor, scalars: Tensor) -> None:
        with torch.no_grad():
            ops.step_([weight], rule="sgd", scalars=scalars, retain_grads=[gradient])

    if compiled:
        torch._dynamo.reset()
        move = torch.compile(move, fullgraph=True, backend="aot_eager")
    weight = torch.ones(40, requires_grad=True)
    loss = (weight**3).sum()
    move(weight, torch.ones(40), ops.scalars(lr=0.5))
    assert torch.equal(weight.detach(), torch.full((40,), 0.5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_leaf_that_requires_grad_needs_no_grad() -> None:
    weights = [torch.ones(3), torch.ones(3, requires_grad=True)]
    before = [weight.detach().clone() for weight in weights]
    options = {"rule": "sgd", "scalars": ops.scalars(lr=0.5), "retain_grads": [torch.ones(3)] * 2}
    with pytest.raises(RuntimeError, match=r"step_.*weights\[1\].*no_grad"):
        ops.step_(weights, **options)
    assert all(same_bits(old, new) for old, new in zip(before, weights, strict=True))
    with torch.no_grad():
        ops.step_(weights, **options)
    assert weights[1].tolist() == [0.5] * 3 and weights[1].requires_grad

    with pytest.raises(RuntimeError, match=r"accumulate_fisher_.*fisher\[0\]"):
        ops.accumulate_fisher_([torch.ones(3, requires_grad=True)], [torch.ones(3)])


@pytest.mark.parametrize("argument", ("slow", "first_moments", "second_moments"))
def test_every_mutated_leaf_that_requires_grad_is_an_error(argument: str) -> None:
    operands = step_operands("adam")
    operands[argument][1].requires_grad_()
    before = [tensor.detach().clone() for tensor in tensors_in(operands)]
    with pytest.raises(RuntimeError, match=rf"step_.*{argument}\[1\]"):
        ops.step_(**operands)
    assert all(same_bits(a, b) for a, b in zip(before, tensors_in(operands), strict=True))


def test_gradients_may_carry_a_graph() -> None:
    """As create_graph=True leaves them; reading numbers needs no graph of its own."""
    leaf = torch.ones(3, requires_grad=True)
    weight = torch.ones(3)
    ops.step_([weight], rule="sgd", scalars=ops.scalars(lr=0.5), retain_grads=[leaf * 1.0])
    assert weight.tolist() == [0.5] * 3
    assert ops.gradient_products([leaf * 2.0])[0].item() == 12.0


def test_inference_tensors() -> None:
    with torch.inference_mode():
        weight = torch.ones(3)
        ops.step_([weight], rule="sgd", scalars=ops.scalars(lr=0.5), retain_grads=[torch.ones(3)])
        assert weight.tolist() == [0.5] * 3


# --- torch.compile ------------------------------------------------------------------------------------------


def whole_iteration(operands: dict[str, Any]) -> tuple[Tensor, ...]:
    """All operators in one graph, with ordinary operations before, between and after."""
    ops.accumulate_fisher_(operands["fisher"], operands["forget_grads"], 0.5)
    ratio, counts = ops.ratio_bits(operands["fisher"], [f + 1.0 for f in operands["fisher"]], gamma=0.5)
    masks = ops.unpack_bits(ratio, operands["weights"])
    top, kept = ops.top_bits(operands["forget_grads"], 30, other=operands["weights"], score="product")
    masks = [mask ^ best for mask, best in zip(masks, ops.unpack_bits(top, operands["weights"]), strict=True)]
    bits = ops.pack_bits([~mask for mask in masks])
    sums = ops.gradient_products(operands["forget_grads"], operands["retain_grads"], bits)
    scalars = operands["scalars"] * torch.where(torch.arange(len(ops.SCALARS)) == 3, 1 / (1 + sums[0].sqrt()), 1.0)
    arguments = {name: operands[name] for name in ("forget_grads", "retain_grads", "slow")}
    moments = {name: operands[name] for name in ("first_moments", "second_moments")}
    ops.step_(operands["weights"], rule="adamw", scalars=scalars, bits=bits, protect=True, **arguments, **moments)
    return counts, kept, sums, ops.count_bits(bits), operands["weights"][0] * 2


def step_among_others(operands: dict[str, Any]) -> tuple[Tensor, ...]:
    """Inductor must neither reorder the mutation nor mutate a copy; few operations, each is compiled by g++."""
    before = operands["weights"][0] * 2
    scalars, retain_grads = operands["scalars"], operands["retain_grads"]
    ops.step_(operands["weights"], rule="sgd", scalars=scalars, retain_grads=retain_grads)
    return before, operands["weights"][0] * 2


def assert_compiles(function: Callable[[dict[str, Any]], tuple[Tensor, ...]], backend: str) -> None:
    torch._dynamo.reset()
    eager, traced = ({**step_operands(), "fisher": ratio_operands()["forget_fisher"]} for _ in range(2))
    with torch.no_grad():
        results = function(eager), torch.compile(function, fullgraph=True, backend=backend)(traced)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(tensors_in(eager), tensors_in(traced), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_compiles_into_one_graph() -> None:
    assert_compiles(whole_iteration, "aot_eager")


@pytest.mark.slow
@pytest.mark.native_only
def test_compiles_with_inductor() -> None:
    assert_compiles(step_among_others, "inductor")


@pytest.mark.parametrize(
    "rule", [pytest.param(rule, marks=() if rule == "adam" else pytest.mark.slow) for rule in RULES]
)
def test_a_compiled_step_takes_new_scalars_and_shapes(rule: str) -> None:
    """Neither a learning rate nor a step count may be baked into the graph."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda operands: ops.step_(**operands), fullgraph=True, backend="aot_eager")
    for t, lr in enumerate((0.1, 0.02, 0.3), start=1):
        scalars = ops.scalars(lr=lr, momentum=0.9, weight_decay=0.1, step=t, slow_rate=0.25)
        eager, traced = (step_operands(rule, scalars=scalars) for _ in range(2))
        ops.step_(**eager)
        compiled(traced)
        assert all(same_bits(a, b) for a, b in zip(tensors_in(eager), tensors_in(traced), strict=True))


# --- Determinism --------------------------------------------------------------------------------------------


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


LARGE = (*((n,) for n in range(1, 200, 23)), (50001,), (40, 1001))


def update_and_gradients(weights: list, slow: list, forget: list, retain: list, bits: list) -> list[Tensor]:
    factors = [torch.tensor(value, requires_grad=True) for value in (0.1, 0.7, 0.5)]
    lists = [[tensor.clone().requires_grad_() for tensor in tensors] for tensors in (weights, slow, forget, retain)]
    names = ("weights", "slow", "forget_grads", "retain_grads")
    options = dict(zip(("lr", "forget_weight", "slow_rate"), factors, strict=True))
    results = ops.update(**dict(zip(names, lists, strict=True)), bits=bits, **options)
    inputs = [*factors, *(tensor for tensors in lists for tensor in tensors)]
    return [*results, *torch.autograd.grad(results, inputs, [result.detach() for result in results])]


def results_of_all() -> list[Tensor]:
    """Everything an operator computes, for lists that span many blocks."""
    rng = torch.Generator().manual_seed(SEED)
    bits = ops.pack_bits([coin(rng, shape) for shape in LARGE])
    outputs = list(bits)
    for dtype in DTYPES:
        weights, forget, retain = (numbers(dtype, LARGE, seed) for seed in (1, 2, 3))
        slow, first, fisher = (numbers(opmath(dtype), LARGE, seed) for seed in (4, 5, 6))
        second = [value.square() for value in first]
        seed = 9 if dtype == torch.bfloat16 else None
        scalars = ops.scalars(lr=0.1, slow_rate=0.5, weight_decay=0.1)
        state = {"first_moments": first, "second_moments": second, "slow": slow}
        grads = {"forget_grads": forget, "retain_grads": retain}
        ops.step_(weights, rule="adamw", scalars=scalars, bits=bits, rounding_seed=seed, **state, **grads)
        outputs += [*weights, *slow, *first, *second]
        outputs += [ops.gradient_products(forget, retain, bits, scope) for scope in ("forget", "all")]
        ops.accumulate_fisher_(fisher, forget, 0.3)
        ratio, counts = ops.ratio_bits([f.abs() for f in fisher], second)
        outputs += [*fisher, *ratio, counts]
        outputs += update_and_gradients(weights, slow, forget, retain, bits)

        for score in ops.SCORES:
            top, counts = ops.top_bits(forget, 20000, other=second if score in ops.SCORES[2:] else (), score=score)
            outputs += [*top, counts]
    return [*outputs, ops.count_bits(bits), *ops.unpack_bits(bits, weights)]


@pytest.mark.slow
def test_same_bits_on_every_run_and_for_every_thread_count(restore_threads: None) -> None:
    torch.set_num_threads(1)
    reference = results_of_all()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        for got, want in zip(results_of_all(), reference, strict=True):
            assert same_bits(got, want), f"{threads} threads, {tuple(got.shape)} {got.dtype}"


def test_sums_do_not_depend_on_the_alignment_of_memory() -> None:
    (values,) = numbers(shapes=((50001,),))
    expected = ops.gradient_products([values], [values])
    for offset in range(1, 9):
        moved = Arena().place(values, Layout(offset=offset))
        assert same_bits(ops.gradient_products([moved], [moved]), expected)
