"""The projection that joint steps fold into the retain gradient's factor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unlearn_ext import InputError, SaliencyMask, UnlearnOptimizer, ops
from unlearn_ext.methods import Projected
from unlearn_ext.optim.step import _conflict

SHAPES = {"a": (4, 3), "b": (5,), "c": (2, 2)}


def made(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES.values()]


def stepped(forget: list[Tensor], retain: list[Tensor], masks: list[Tensor] | None = None, **settings):
    named = [(name, torch.nn.Parameter(w)) for name, w in zip(SHAPES, made(0), strict=True)]
    groups = [{"params": named[:2]}, {"params": named[2:], "forget_weight": 3.0, "retain_weight": 0.5}]
    mask = None if masks is None else SaliencyMask.from_dict(dict(zip(SHAPES, masks, strict=True)))
    optimizer = UnlearnOptimizer(groups, rule="sgd", lr=0.1, mask=mask, project=True, **settings)
    optimizer.joint_step(forget, retain)
    return [p.detach() for _, p in named], optimizer


def expected(forget, retain, masks, scope: str, max_norm: float | None, retain_max_norm: float | None) -> list[Tensor]:
    """Flat float64 arithmetic on the whole vector."""
    weights = torch.cat([w.flatten() for w in made(0)])
    cut = torch.tensor([1.0] * 17 + [0.0] * 4).double()
    keep = torch.ones(21).double() if masks is None else torch.cat([m.flatten() for m in masks]).double()
    f = torch.cat([g.flatten() for g in forget]) * keep * (cut + 3.0 * (1 - cut))
    r = torch.cat([g.flatten() for g in retain]) * (keep if scope == "all" else 1.0) * (cut + 0.5 * (1 - cut))
    clipped = r
    if max_norm is not None:
        f = f * min(1.0, max_norm / (float(f.norm()) + 1e-6))
    if retain_max_norm is not None:
        clipped = r * min(1.0, retain_max_norm / (float(r.norm()) + 1e-6))
    if f @ r < 0:
        f = f - (f @ r) / (r @ r) * r
        assert (f @ r).abs() < 1e-12
    moved = weights - 0.1 * (f + clipped)
    return [part.view(shape) for part, shape in zip(moved.split([12, 5, 4]), SHAPES.values(), strict=True)]


@pytest.mark.parametrize("conflicting", [True, False])
@pytest.mark.parametrize("scope", ["forget", "all"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("max_norm", "retain_max_norm"), [(None, None), (0.3, None), (0.3, 0.2)])
def test_the_conflicting_part_is_taken_out(max_norm, retain_max_norm, masked, scope, conflicting) -> None:
    forget, retain = made(1), made(2)
    masks = [g > -0.5 for g in made(3)] if masked else None
    sign = -1.0 if conflicting else 1.0
    retain = [sign * (0.5 * f + r) for f, r in zip(forget, retain, strict=True)]  # along it, or against
    weights, optimizer = stepped(
        forget, retain, masks, mask_scope=scope, max_norm=max_norm, retain_max_norm=retain_max_norm
    )
    wanted = expected(forget, retain, masks, scope, max_norm, retain_max_norm)
    for got, want in zip(weights, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    assert bool(optimizer.last_projection > 0) == conflicting


def test_on_a_device_the_share_is_a_tensor_that_nothing_waits_for() -> None:
    for product, square, share in ((-2.0, 4.0, 0.5), (2.0, 4.0, 0.0), (0.0, 0.0, 0.0)):
        found = _conflict(torch.tensor(product), torch.tensor(square))
        assert isinstance(found, Tensor) and found == share == _conflict(product, square)


def test_nothing_is_read_again(monkeypatch) -> None:
    calls: list[str] = []
    for name in ("gradient_products", "step_"):
        own = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, own=own, name=name, **k: (calls.append(name), own(*a, **k))[1])
    stepped(made(1), [-g for g in made(1)])
    assert sorted(calls) == ["gradient_products"] * 2 + ["step_"] * 2  # once for each group


def test_no_retain_gradient_and_other_steps() -> None:
    zeros = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES.values()]
    weights, optimizer = stepped(made(1), zeros)
    assert optimizer.last_projection == 0
    for got, want in zip(weights, expected(made(1), zeros, None, "forget", None, None), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    weights, optimizer = stepped(made(1), [-g for g in made(1)])
    optimizer.last_projection = None
    optimizer.forget_step(made(1))
    optimizer.retain_step(made(2))
    assert optimizer.last_projection is None
    with pytest.raises(InputError, match="set update='joint'"):
        Projected(update="sequential")
