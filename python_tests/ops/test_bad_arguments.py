"""What is no list of tensors and no number is refused in one sentence, before anything is written."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from unlearn_ext import ops
from unlearn_ext.errors import InputError

LISTS = {
    "step_": lambda x: ops.step_(x, rule="sgd", scalars=ops.scalars(lr=0.1), retain_grads=[torch.ones(1)]),
    "gradient_products": lambda x: ops.gradient_products(x),
    "accumulate_fisher_": lambda x: ops.accumulate_fisher_(x, [torch.ones(1)]),
    "ratio_bits": lambda x: ops.ratio_bits(x, [torch.ones(1)]),
    "top_bits": lambda x: ops.top_bits(x, 1),
    "pack_bits": ops.pack_bits,
    "unpack_bits": lambda x: ops.unpack_bits(x, [torch.ones(1)]),
    "count_bits": ops.count_bits,
    "update": lambda x: ops.update(x, lr=0.1, retain_grads=[torch.ones(1)]),
}


@pytest.mark.parametrize(
    "value", (torch.ones(1, 1), None, {"a": torch.ones(1)}, "a"), ids=("tensor", "None", "dict", "str")
)
@pytest.mark.parametrize("name", LISTS)
def test_what_is_no_list_of_tensors(name: str, value: Any) -> None:
    """A tensor of one row would pass for a list of one tensor."""
    with pytest.raises(InputError, match=f"^{name}: [a-z_]+: expected a list of tensors, got"):
        LISTS[name](value)


def test_any_iterable_is_a_list() -> None:
    weights, gradient = [torch.ones(3)], [torch.ones(3)]
    ops.step_((w for w in weights), rule="sgd", scalars=ops.scalars(lr=0.5), retain_grads=iter(gradient))
    assert torch.equal(weights[0], torch.full((3,), 0.5))
    assert ops.count_bits(words for words in ops.pack_bits(iter([torch.ones(3).bool()]))).tolist() == [3]


NUMBERS = {
    "scalars: lr": lambda x: ops.scalars(lr=x),
    "scalars: beta1": lambda x: ops.scalars(lr=0.1, beta1=x),
    "scalars: step": lambda x: ops.scalars(lr=0.1, step=x),
    "accumulate_fisher_: weight": lambda x: ops.accumulate_fisher_([torch.ones(1)], [torch.ones(1)], x),
    "ratio_bits: gamma": lambda x: ops.ratio_bits([torch.ones(1)], [torch.ones(1)], gamma=x),
    "ratio_bits: retain_scale": lambda x: ops.ratio_bits([torch.ones(1)], [torch.ones(1)], retain_scale=x),
    "top_bits: eps": lambda x: ops.top_bits([torch.ones(1)], 1, eps=x),
    "update: slow_rate": lambda x: ops.update([torch.ones(1)], lr=0.1, slow_rate=x),
}


@pytest.mark.parametrize("value", (math.nan, None, "0.1", [0.1], np.ones(2)), ids=str)
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number(name: str, value: Any) -> None:
    """NaN among them: a mask would be empty and weights lost, in silence."""
    with pytest.raises(InputError, match=f"^{name}: expected an? [a-z]+.*, got "):
        NUMBERS[name](value)
