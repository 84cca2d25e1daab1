"""update in a graph: twice, in several roles, only what is needed, and hypergradients through unrolled steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from helpers.layouts import assert_ulps, coin, normal
from helpers.updates import LISTS, SCALARS, Calls, call, flat, followed, new_operands, new_scalars, transcription
from torch import Tensor
from torch.nn import functional

from unlearn_ext import ops

# --- In a graph ---------------------------------------------------------------------------------------------


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
