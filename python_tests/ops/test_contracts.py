"""What all operators promise: opcheck, version counters, autograd, torch.compile, determinism, errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers.layouts import CHANNELS_LAST, DTYPES, RULES, SEED, Arena, Layout, coin, normal, opmath, same_bits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unlearn_ext import ops

SHAPES = ((5, 7), (33,), (), (0,))


def numbers(dtype: torch.dtype = torch.float32, shapes: Sequence[Sequence[int]] = SHAPES, seed: int = SEED) -> list:
    rng = torch.Generator().manual_seed(seed)
    return [normal(rng, shape, dtype) for shape in shapes]


def some_bits(shapes: Sequence[Sequence[int]] = SHAPES) -> list[Tensor]:
    rng = torch.Generator().manual_seed(SEED)
    return ops.pack_bits([coin(rng, shape) for shape in shapes])


def step_operands(rule: str = "adamw", dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    """Valid arguments of ops.step_ with every operand that the rule takes."""
    wide = opmath(dtype)
    operands = {
        "weights": numbers(dtype, seed=1),
        "forget_grads": numbers(dtype, seed=2),
        "retain_grads": numbers(dtype, seed=3),
        "slow": numbers(wide, seed=4),
        "bits": some_bits(),
        "rule": rule,
        "scalars": ops.scalars(lr=0.1, weight_decay=0.1, momentum=0.9, slow_rate=0.5),
    }
    if rule != "sgd":
        operands["first_moments"] = numbers(wide, seed=5)
    if rule in ("adam", "adamw"):
        operands["second_moments"] = [value.square() for value in numbers(wide, seed=6)]
    return operands | changes


def fisher_operands(**changes: Any) -> dict[str, Any]:
    return {"fisher": numbers(seed=1), "grads": numbers(seed=2)} | changes


def products_operands(**changes: Any) -> dict[str, Any]:
    return {"forget_grads": numbers(seed=1), "retain_grads": numbers(seed=2), "bits": some_bits()} | changes


def ratio_operands(**changes: Any) -> dict[str, Any]:
    fishers = {"forget_fisher": numbers(seed=1), "retain_fisher": numbers(seed=2)}
    return {name: [value.square() for value in values] for name, values in fishers.items()} | changes


def top_operands(**changes: Any) -> dict[str, Any]:
    return {"scores": numbers(seed=1), "k": 30, "other": numbers(seed=2), "score": "product"} | changes


def unpack_operands(**changes: Any) -> dict[str, Any]:
    return {"bits": some_bits(), "like": numbers()} | changes


def update_operands(**changes: Any) -> dict[str, Any]:
    lists = ("weights", "forget_grads", "retain_grads", "slow")
    operands = {name: numbers(seed=i) for i, name in enumerate(lists)}
    return {**operands, "bits": some_bits(), "lr": 0.1, "slow_rate": 0.5, **changes}


def tensors_in(operands: dict[str, Any]) -> list[Tensor]:
    """All that have memory of the usual kind."""
    lists = [value if isinstance(value, list) else [value] for value in operands.values()]
    tensors = [value for values in lists for value in values if isinstance(value, Tensor)]
    return [tensor for tensor in tensors if tensor.layout == torch.strided and not tensor.is_meta]


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


# --- Errors -------------------------------------------------------------------------------------------------


def replaced(tensors: Sequence[Tensor], index: int, other: Tensor) -> list[Tensor]:
    return [other if i == index else tensor for i, tensor in enumerate(tensors)]


def bad_list(good: Sequence[Tensor]) -> list[tuple[str, list[Tensor]]]:
    """What every list refuses: (pattern of the message after the argument's name, list)."""
    return [
        (r"\[0\].*\[5, 7\].*\[7, 5\]", replaced(good, 0, good[0].reshape(7, 5))),
        (r"\[1\].*\[33\].*\[34\]", replaced(good, 1, torch.zeros(34, dtype=good[1].dtype))),
        (r"\[2\].*\[\].*\[1\]", replaced(good, 2, torch.zeros(1, dtype=good[2].dtype))),
        (r".*4.*3", list(good[:3])),
        (r".*4.*5", [*good, good[0]]),
    ]


def bad_dtypes(good: Sequence[Tensor], *dtypes: torch.dtype) -> list[tuple[str, list[Tensor]]]:
    return [(r"\[1\].*dtype", replaced(good, 1, good[1].to(dtype))) for dtype in dtypes]


def step_errors() -> Iterator[tuple[str, dict[str, Any]]]:
    good = step_operands()
    integer, state = (torch.int32, torch.complex64), (torch.float64, torch.bfloat16, torch.float16)
    for name in ("forget_grads", "retain_grads", "slow", "first_moments", "second_moments"):
        for pattern, tensors in bad_list(good[name]):
            yield name + pattern, step_operands(**{name: tensors})
        for pattern, tensors in bad_dtypes(good[name], *integer):
            yield name + pattern, step_operands(**{name: tensors})
    for pattern, tensors in bad_dtypes(good["weights"], *integer):
        yield "weights" + pattern, step_operands(weights=tensors)
    for name in ("slow", "first_moments", "second_moments"):
        for pattern, tensors in bad_dtypes(good[name], *state):
            yield name + pattern, step_operands(**{name: tensors})
        wide = step_operands(dtype=torch.float64)
        yield rf"{name}\[1\].*dtype", wide | {name: replaced(wide[name], 1, wide[name][1].float())}
    yield "first_moments.*4.*0", step_operands("momentum", first_moments=[])
    yield "second_moments.*4.*0", step_operands("adam", second_moments=[])

    bits = good["bits"]
    yield "bits.*4.*3", step_operands(bits=bits[:3])
    yield r"bits\[1\].*\[2\].*\[1\]", step_operands(bits=replaced(bits, 1, bits[1][:1]))
    yield r"bits\[0\]", step_operands(bits=replaced(bits, 0, bits[0].long()))
    yield r"bits\[0\]", step_operands(bits=replaced(bits, 0, bits[0].repeat(2)[::2]))
    yield r"bits\[0\]", step_operands(bits=replaced(bits, 0, torch.ones(5, 7, dtype=torch.bool)))

    yield "rule.*sgd.*nesterov", step_operands(rule="nesterov")
    yield "mask_scope.*retain", step_operands(mask_scope="retain")
    yield "rounding_seed.*-1", step_operands(rounding_seed=-1)
    yield "scalars", step_operands(scalars=torch.zeros(3, dtype=torch.float64))
    yield "scalars", step_operands(scalars=good["scalars"].float())
    yield "forget_grads, retain_grads", step_operands(forget_grads=[], retain_grads=[], slow=[])
    yield "protect", step_operands(bits=[], protect=True)
    # What nn.Embedding(sparse=True) yields; and tensors without memory, which must not turn the step into nothing.
    for name in ("forget_grads", "retain_grads"):
        sparse, meta = good[name][0].to_sparse(), good[name][1].to("meta")
        yield rf"{name}\[0\].*(dense|strided|layout)", step_operands(**{name: replaced(good[name], 0, sparse)})
        yield rf"{name}\[1\]", step_operands(**{name: replaced(good[name], 1, meta)})


def aliasing_errors() -> Iterator[tuple[str, dict[str, Any]]]:
    """Memory that two threads, or two lanes of one, would write."""
    weights = numbers()
    buffer = torch.zeros(60)
    plain = {"rule": "sgd", "scalars": ops.scalars(lr=0.1)}

    def steps(*weights: Tensor) -> dict[str, Any]:
        return {"weights": list(weights), "retain_grads": [torch.ones(w.shape) for w in weights], **plain}

    yield r"weights\[1\].*weights\[0\]", steps(weights[0], weights[0])
    yield r"weights\[[02]\].*weights\[[02]\]", steps(weights[0], weights[1], weights[0].t())
    yield r"weights\[1\].*weights\[0\]", steps(buffer[:40], buffer[39:])
    yield r"weights\[1\].*weights\[0\]", steps(buffer[::2], buffer[::2])
    # Views with gaps: two that share every other element, one that runs into a neighbour, and two that interleave.
    yield r"weights\[1\].*weights\[0\]", steps(buffer[0:40:2], buffer[20:60:2])
    yield r"weights\[1\].*weights\[0\]", steps(buffer.view(6, 10)[:, ::2], buffer[30:35])
    yield r"weights\[1\].*weights\[0\]", steps(buffer[::2], buffer[1::2])
    yield r"weights\[0\]", steps(torch.zeros(3).expand(5, 3))
    yield r"weights\[1\]", steps(weights[0], torch.zeros(1).expand(9))
    yield r"weights\[0\]", steps(torch.zeros(20).as_strided((4, 4), (2, 1)))
    slow = replaced(numbers(), 1, weights[1])
    yield r"slow\[1\].*weights\[1\]|weights\[1\].*slow\[1\]", step_operands(weights=weights, slow=slow)
    first = numbers(seed=8)
    second = replaced(numbers(seed=9), 0, first[0])
    pattern = r"(first|second)_moments\[0\].*(first|second)_moments\[0\]"
    yield pattern, step_operands(first_moments=first, second_moments=second)


def other_errors() -> Iterator[tuple[Callable[..., object], str, dict[str, Any]]]:
    for name, operands in (("retain_grads", products_operands), ("bits", products_operands)):
        good = operands()[name]
        lists = bad_list(good) if name != "bits" else [(".*4.*3", good[:3]), (r"\[0\]", replaced(good, 0, good[0][:1]))]
        for pattern, tensors in lists:
            yield ops.gradient_products, name + pattern, operands(**{name: tensors})
    for name in ("forget_grads", "retain_grads"):
        for pattern, tensors in bad_dtypes(numbers(), torch.int64, torch.bool):
            yield ops.gradient_products, name + pattern, products_operands(**{name: tensors})
    yield ops.gradient_products, "forget_grads, retain_grads", {}
    yield ops.gradient_products, "mask_scope", products_operands(mask_scope="none")

    for pattern, tensors in bad_list(numbers()):
        yield ops.accumulate_fisher_, "grads" + pattern, fisher_operands(grads=tensors)
        yield ops.ratio_bits, "retain_fisher" + pattern, ratio_operands(retain_fisher=tensors)
    yield ops.accumulate_fisher_, "grads.*4.*0", fisher_operands(grads=[])
    yield ops.accumulate_fisher_, "grads", fisher_operands(fisher=[])
    for pattern, tensors in bad_dtypes(numbers(), torch.int32, torch.bfloat16, torch.float16):
        yield ops.accumulate_fisher_, "fisher" + pattern, fisher_operands(fisher=tensors)
        yield ops.ratio_bits, "forget_fisher" + pattern, ratio_operands(forget_fisher=tensors)
        yield ops.ratio_bits, "retain_fisher" + pattern, ratio_operands(retain_fisher=tensors)
    for pattern, tensors in bad_dtypes(numbers(), torch.int32, torch.bool):
        yield ops.accumulate_fisher_, "grads" + pattern, fisher_operands(grads=tensors)
    fisher = numbers()
    shared = {"fisher": replaced(fisher, 1, fisher[0].view(-1)[:33]), "grads": numbers()}
    yield ops.accumulate_fisher_, r"fisher\[1\].*fisher\[0\]|fisher\[0\].*fisher\[1\]", shared
    yield ops.accumulate_fisher_, r"fisher\[0\]", {"fisher": [torch.zeros(1).expand(4)], "grads": [torch.ones(4)]}
    yield ops.ratio_bits, "retain_fisher.*4.*0", ratio_operands(retain_fisher=[])
    yield ops.ratio_bits, "retain_fisher", ratio_operands(forget_fisher=[])

    for pattern, tensors in bad_list(numbers()):
        yield ops.top_bits, "other" + pattern, top_operands(other=tensors)
    for pattern, tensors in bad_dtypes(numbers(), torch.int32, torch.bool):
        yield ops.top_bits, "other" + pattern, top_operands(other=tensors)
        yield ops.top_bits, "scores" + pattern, top_operands(scores=tensors)
    for score in ops.SCORES[2:]:
        yield ops.top_bits, "other.*4.*0", top_operands(score=score, other=[])
    for score in ops.SCORES[:2]:
        yield ops.top_bits, "other.*no tensors.*4", top_operands(score=score)
    for k in (-1, 70):  # of 35 + 33 + 1
        yield ops.top_bits, f"k.*69.*{k}", top_operands(k=k)
    yield ops.top_bits, "k.*1", {"scores": [], "k": 1}
    yield ops.top_bits, "other.*no tensors.*4", top_operands(scores=[], k=0)
    yield ops.top_bits, "score.*magnitude.*rank", top_operands(score="rank")

    yield ops.pack_bits, r"masks\[1\].*dtype", {"masks": [torch.ones(3, dtype=torch.bool), torch.ones(3)]}
    yield ops.unpack_bits, "bits.*4.*3", unpack_operands(bits=some_bits()[:3])
    bits = some_bits()
    yield ops.unpack_bits, r"bits\[0\]", unpack_operands(bits=replaced(bits, 0, bits[0][:1]))
    yield ops.unpack_bits, r"bits\[1\]", unpack_operands(bits=replaced(bits, 1, bits[1].long()))
    yield ops.unpack_bits, "bits", unpack_operands(like=[])
    yield ops.count_bits, r"bits\[1\].*dtype", {"bits": [torch.ones(3, dtype=torch.int32), torch.ones(3)]}


def update_errors() -> Iterator[tuple[str, dict[str, Any]]]:
    good = update_operands()
    for name in ("forget_grads", "retain_grads", "slow"):
        for pattern, tensors in (*bad_list(good[name]), *bad_dtypes(good[name], torch.int32)):
            yield name + pattern, update_operands(**{name: tensors})
    for pattern, tensors in bad_dtypes(good["weights"], torch.int32):
        yield "weights" + pattern, update_operands(weights=tensors)
    for pattern, tensors in bad_dtypes(good["slow"], torch.float64, torch.bfloat16):
        yield "slow" + pattern, update_operands(slow=tensors)
    yield "bits.*4.*3", update_operands(bits=good["bits"][:3])
    yield r"bits\[0\]", update_operands(bits=replaced(good["bits"], 0, good["bits"][0].long()))
    yield "mask_scope.*retain", update_operands(mask_scope="retain")
    yield "forget_grads, retain_grads", update_operands(forget_grads=[], retain_grads=[], slow=[])
    yield r"lr.*\[2\]", update_operands(lr=torch.ones(2))
    yield r"slow_rate.*\[0\]", update_operands(slow_rate=torch.ones(0))
    sparse, meta = good["forget_grads"][0].to_sparse(), good["forget_grads"][1].to("meta")
    yield r"forget_grads\[0\].*layout", update_operands(forget_grads=replaced(good["forget_grads"], 0, sparse))
    yield r"forget_grads\[1\]", update_operands(forget_grads=replaced(good["forget_grads"], 1, meta))


ERRORS = [(ops.step_, *case) for case in (*step_errors(), *aliasing_errors())] + list(other_errors())
ERRORS += [(ops.update, *case) for case in update_errors()]


@pytest.mark.parametrize(
    "operator, pattern, operands",
    ERRORS,
    ids=[f"{i}-{case[0].__name__}-{re.sub('[^a-z_]+', '-', case[1])}" for i, case in enumerate(ERRORS)],
)
def test_errors_name_what_is_wrong_and_nothing_is_written(
    operator: Callable[..., object], pattern: str, operands: dict[str, Any]
) -> None:
    before = [tensor.clone() for tensor in tensors_in(operands)]
    with pytest.raises((RuntimeError, ValueError)) as caught:
        operator(**operands)
    message = str(caught.value).splitlines()[0]
    assert re.search(rf"\b{operator.__name__}: .*{pattern}", message), message
    assert "expected" in message and "got" in message, message
    assert all(same_bits(a, b) for a, b in zip(before, tensors_in(operands), strict=True))


def test_scalars_refuse_a_step_count_of_zero() -> None:
    """Adam's bias corrections would be 0."""
    with pytest.raises(ValueError, match="step"):
        ops.scalars(lr=0.1, step=0)


def test_a_failed_call_leaves_views_alone() -> None:
    """Operands that would be copied into another order are checked before they are."""
    weight = torch.ones(4, 3, 5, 5).to(memory_format=torch.channels_last)[:, :, ::2]
    operands = {"weights": [weight, torch.ones(3)], "retain_grads": [torch.ones(weight.shape), torch.ones(4)]}
    with pytest.raises(RuntimeError, match=r"retain_grads\[1\]"):
        ops.step_(rule="sgd", scalars=ops.scalars(lr=0.5), **operands)
    assert torch.equal(weight, torch.ones(weight.shape))


def test_channels_last_operands_share_nothing_by_accident() -> None:
    """Dense views in any order of dimensions are no overlap, nor are neighbours in one buffer."""
    buffer = torch.ones(2 * 120)
    shape = (2, 3, 4, 5)
    strides = CHANNELS_LAST.strides(shape)
    weights = [buffer.as_strided(shape, strides, 0), buffer.as_strided(shape, strides, 120)]
    gradients = [torch.ones(shape), torch.full(shape, 2.0)]
    ops.step_(weights, rule="sgd", scalars=ops.scalars(lr=0.25), retain_grads=gradients)
    assert buffer.tolist() == [0.75] * 120 + [0.5] * 120
