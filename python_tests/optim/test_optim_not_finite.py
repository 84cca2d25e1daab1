"""Gradients that are not finite, or not in the weights' range, in UnlearnOptimizer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.layouts import normal
from helpers.optimizers import HYPER, assert_same_bits, gradients, masks_of, named, snapshot
from torch import nn

from unlearn_ext.errors import NonFiniteError
from unlearn_ext.optim import UnlearnOptimizer, step
from unlearn_ext.saliency import SaliencyMask


@pytest.mark.parametrize("value", (math.inf, -math.inf, math.nan))
@pytest.mark.parametrize("op", ("forget", "retain", "joint"))
def test_a_non_finite_gradient_raises_and_writes_nothing(op: str, value: float, rng: torch.Generator) -> None:
    parameters = named(torch.float32)
    masks = masks_of(parameters)
    optimizer = UnlearnOptimizer(
        parameters, mask=SaliencyMask.from_dict(masks), slow_rate=0.5, slow_freq=2, rule="adamw", **HYPER
    )
    optimizer.retain_step(gradients(rng, parameters))
    good, bad = gradients(rng, parameters), gradients(rng, parameters)
    kept = masks["layer3.weight"].nonzero()[0]
    bad[3][tuple(kept)] = value
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    part = "retain" if op == "retain" else "forget"
    with pytest.raises(NonFiniteError, match=rf"^{op}_step: the {part} gradient of layer3\.weight is not finite"):
        if op == "joint":
            optimizer.joint_step(bad, good)
        else:
            getattr(optimizer, f"{op}_step")(bad)
    assert_same_bits(before, snapshot(optimizer))
    assert optimizer.state_dict()["param_groups"] == groups
    optimizer.raise_if_non_finite()  # told already


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["forget", "retain", "joint"])
def test_a_wide_gradient_that_overflows_raises_and_writes_nothing(op: str, dtype: torch.dtype) -> None:
    """1e300 is finite in float64, in which norms are summed, and an infinity in float32, in which the step is made."""
    parameters = named(dtype)
    optimizer = UnlearnOptimizer(parameters, rule="momentum", lr=0.1, momentum=0.9)
    wide = [torch.ones(p.shape, dtype=torch.float64) for _, p in parameters]
    optimizer.retain_step(wide)
    before = snapshot(optimizer)
    wide[1][3] = 1e300
    with pytest.raises(NonFiniteError, match=r"gradient of layer1\.weight is not finite and no weight was changed"):
        optimizer.joint_step(wide, wide) if op == "joint" else getattr(optimizer, f"{op}_step")(wide)
    assert_same_bits(before, snapshot(optimizer))


def test_a_wide_gradient_is_rounded_as_its_weight_is() -> None:
    weight = nn.Parameter(torch.zeros(6, 5, 3, 3).to(memory_format=torch.channels_last))
    rng = torch.Generator().manual_seed(4)
    gradient = normal(rng, weight.shape, torch.float64)
    UnlearnOptimizer([("w", weight)], rule="sgd", lr=1.0).retain_step([gradient])
    assert torch.equal(weight, -gradient.float())


def test_a_masked_out_infinity_is_no_error(rng: torch.Generator) -> None:
    parameters = named()
    masks = masks_of(parameters)
    clean = gradients(rng, parameters)
    dirty = [torch.where(masks[name], g, math.inf) for (name, _), g in zip(parameters, clean, strict=True)]
    results = []
    for grads in (clean, dirty):
        own = named()
        optimizer = UnlearnOptimizer(own, rule="adam", max_norm=0.3, mask=SaliencyMask.from_dict(masks), **HYPER)
        optimizer.forget_step(grads)
        results.append(snapshot(optimizer))
    assert_same_bits(*results)
    with pytest.raises(NonFiniteError, match=r"the retain gradient of layer0\.weight"):
        optimizer.retain_step(dirty)


def test_unnamed_parameters_are_told_by_number() -> None:
    optimizer = UnlearnOptimizer([nn.Parameter(torch.ones(2)) for _ in range(3)], rule="sgd", lr=0.1)
    with pytest.raises(NonFiniteError, match="gradient of parameter 2 is not finite"):
        optimizer.forget_step([torch.ones(2), None, torch.tensor([0.0, math.nan])])


def test_a_skipped_step_does_not_end_the_round(monkeypatch) -> None:
    """Where the host does not wait to know that a gradient is not finite, the whole step has to write nothing."""
    monkeypatch.setattr(step, "raise_non_finite", lambda _: None)
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = UnlearnOptimizer([a, b], rule="momentum", lr=0.5, momentum=0.5, slow_rate=0.5, slow_freq=2)
    optimizer.retain_step([torch.ones(2), torch.ones(2)])
    before = {name: value for name, value in snapshot(optimizer).items() if "step" not in name}
    optimizer.retain_step([torch.full((2,), math.inf), None])
    after = snapshot(optimizer)
    assert_same_bits(before, {name: after[name] for name in before})
