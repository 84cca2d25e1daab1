"""update under opcheck and torch.compile."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers.layouts import coin, same_bits
from helpers.updates import (
    PARTS,
    SCALARS,
    SCOPES,
    Calls,
    Operands,
    call,
    flat,
    followed,
    new_operands,
    new_scalars,
)
from torch import Tensor
from torch.utils._pytree import tree_map_only

from unlearn_ext import ops

OPCHECKED = [
    pytest.param(parts, scope, id=f"{name}-{scope}", marks=() if name == "both-slow" else pytest.mark.slow)
    for name, parts in PARTS.items()
    for scope in SCOPES
]


@pytest.mark.parametrize(("parts", "mask_scope"), OPCHECKED)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param("inductor", marks=pytest.mark.native_only),
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
