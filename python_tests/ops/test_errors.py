"""Errors name operator, argument, index, expected and got, and nothing has been written by then."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers.layouts import CHANNELS_LAST, same_bits
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

from unlearn_ext import ops


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
