"""update: hand-computed numbers, the plain step's bits, and the same bits for every thread count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from helpers.layouts import DTYPES, assert_ulps, coin, normal, same_bits
from helpers.updates import LISTS, SCALARS, call, flat, followed, mask_cases, new_operands, new_scalars, parts_cases

from unlearn_ext import ops


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
