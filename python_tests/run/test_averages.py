"""Moving averages keep the bits of weights that do not move."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.models import batches, make
from helpers.runs import method
from torch import nn

from unlearn_ext import SaliencyMask, Unlearner
from unlearn_ext.run.averages import Averages
from unlearn_ext.tasks import Classification


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({8: torch.int64, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_protected_zeros_keep_their_sign(dtype) -> None:
    model = make().to(dtype)
    with torch.no_grad():
        model.head.weight[:, ::2] = -0.0
        model.head.weight[0] = 0.0
    mask = SaliencyMask.from_dict({n: torch.full(p.shape, n == "conv.bias") for n, p in model.named_parameters()})
    data = {"forget": batches(2, 6, seed=1, dtype=dtype), "retain": batches(2, 6, seed=2, dtype=dtype)}
    settings = method(gamma=None, mask=mask, mask_scope="all", protect=True, iterations=4)
    result = Unlearner(model, Classification(), settings, ema_decay=0.9).run(**data)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, p in model.named_parameters():
        if name != "conv.bias":
            assert torch.equal(bits(result.ema[name]), bits(p.detach().to(wide))), name
    assert result.moved_protected == 0 and bool(torch.signbit(result.ema["head.weight"][1, 0]))


def test_the_others_follow_the_formula() -> None:
    p = nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    averages = Averages([("p", p)], 0.9)
    expected = p.detach().double()
    for seed in range(5):
        with torch.no_grad():
            p[::2] += torch.randn(500, generator=torch.Generator().manual_seed(seed))
        averages.update()
        expected = 0.9 * expected + 0.1 * p.detach().double()
    torch.testing.assert_close(averages.tensors["p"].double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(averages.tensors["p"][1::2], p.detach()[1::2])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_weight_that_is_infinite_or_zero_and_stays(layout) -> None:
    values = torch.tensor([-0.0, 0.0, math.inf, -math.inf, 1.5, -2.5]).repeat(8).view(2, 3, 2, 4)
    p = nn.Parameter(values.clone(memory_format=layout))
    averages = Averages([("p", p)], 0.75)
    with torch.no_grad():
        p[values == 1.5] = 4.0
    averages.update()
    expected = torch.where(values == 1.5, torch.tensor(2.125), values)
    assert torch.equal(bits(averages.tensors["p"]), bits(expected))
    assert averages.tensors["p"].stride() == p.stride()
