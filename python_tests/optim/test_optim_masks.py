"""Masks and protection in UnlearnOptimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.layouts import same_bits
from helpers.optimizers import HYPER, Grads, gradients, masks_of, named, values
from torch import nn

from unlearn_ext.optim import UnlearnOptimizer
from unlearn_ext.saliency import SaliencyMask
from unlearn_ext.saliency.protection import protected_hashes


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("scope", ("forget", "all"))
def test_protected_weights_keep_their_bits(scope: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    parameters = named(dtype)
    masks = masks_of(parameters)
    mask = SaliencyMask.from_dict(masks)
    options = {"rule": "adamw", "lr": 0.1, "weight_decay": 0.5, "slow_rate": 0.5, "mask_scope": scope}
    optimizer = UnlearnOptimizer(parameters, mask=mask, protect=True, **options)
    weights, bits = [p for _, p in parameters], mask.bind(parameters)
    start, hashes = values(parameters), protected_hashes(weights, bits)
    for _ in range(100):
        optimizer.forget_step(gradients(rng, parameters))
        if scope == "all":
            optimizer.retain_step(gradients(rng, parameters))
            optimizer.joint_step(gradients(rng, parameters), gradients(rng, parameters))
    for (name, p), old in zip(parameters, start, strict=True):
        keep = masks[name]
        assert same_bits(p.detach()[~keep], old[~keep]), name
        assert not keep.any() or not same_bits(p.detach()[keep], old[keep]), name
    assert protected_hashes(weights, bits) == hashes
    if scope == "forget":
        optimizer.retain_step(gradients(rng, parameters))
        assert protected_hashes(weights, bits) != hashes, "retain steps are not masked"


def test_without_protection_decay_moves_masked_weights() -> None:
    p = nn.Parameter(torch.ones(2))
    mask = SaliencyMask.from_dict({"w": torch.tensor([True, False])})
    UnlearnOptimizer([("w", p)], rule="adamw", lr=0.5, weight_decay=0.5, mask=mask).forget_step([torch.zeros(2)])
    assert p.tolist() == [0.75, 0.75]


def test_protection_holds_when_the_gradient_is_absent() -> None:
    """The end of a round moves tensors without gradient too, and in a masked step it has to spare the protected."""
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    mask = SaliencyMask.from_dict({name: torch.tensor([True, False]) for name in "ab"})
    options = {"rule": "sgd", "lr": 0.5, "slow_rate": 0.5, "slow_freq": 2}
    optimizer = UnlearnOptimizer([("a", a), ("b", b)], mask=mask, protect=True, **options)
    ones = torch.ones(2)
    optimizer.retain_step([ones, ones])  # not masked: 1 → 0.5
    optimizer.joint_step([ones, None], [ones, None])  # masked, closes the round
    # a: kept 0.5 - 0.5·2 = -0.5, then half way back to 1. b: kept half way from 0.5 to 1.
    assert (a.tolist(), b.tolist()) == ([0.25, 0.5], [0.75, 0.5])


def test_protected_negative_zero_survives_the_end_of_a_round() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.tensor([-0.0, 1.0]))
    mask = SaliencyMask.from_dict({"a": torch.ones(2, dtype=torch.bool), "b": torch.zeros(2, dtype=torch.bool)})
    options = {"rule": "sgd", "lr": 0.5, "slow_rate": 0.5, "mask_scope": "all", "protect": True}
    optimizer = UnlearnOptimizer([("a", a), ("b", b)], mask=mask, **options)
    before = b.detach().clone()
    optimizer.retain_step([torch.ones(2), None])
    assert same_bits(b.detach(), before)


@pytest.mark.parametrize("gradient_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("scope", ("forget", "all"))
def test_channels_last_weights(scope: str, gradient_format: torch.memory_format, rng: torch.Generator) -> None:
    """The result does not depend on how weights and gradients lie in memory, clipping by the masked norm included."""
    shapes = ((4, 3, 3, 5), (8, 4, 2, 2), (6,))
    plain, other = named(shapes=shapes), named(shapes=shapes)
    other = [(n, nn.Parameter(p.to(memory_format=torch.channels_last)) if p.dim() == 4 else p) for n, p in other]
    mask = SaliencyMask.from_dict(masks_of(plain))
    options = {"rule": "momentum", "mask": mask, "mask_scope": scope, "max_norm": 0.5, "retain_max_norm": 0.5}
    one, two = (UnlearnOptimizer(p, slow_rate=0.5, **options, **HYPER) for p in (plain, other))

    def relaid(grads: Grads) -> Grads:
        return [g.to(memory_format=gradient_format) if g.dim() == 4 else g for g in grads]

    for _ in range(3):
        forget, retain = gradients(rng, plain), gradients(rng, plain)
        one.forget_step(forget)
        two.forget_step(relaid(forget))
        torch.testing.assert_close(one.last_clip, two.last_clip, rtol=1e-14, atol=0)
        for optimizer, grads in ((one, forget), (two, relaid(forget))):
            optimizer.joint_step(grads, retain)
        one.retain_step(retain)
        two.retain_step(relaid(retain))
    for (_, p), (_, q) in zip(plain, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-14)
    assert two.state[other[0][1]]["momentum_buffer"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("wrap", (lambda m: torch.compile(m, backend="aot_eager"), nn.DataParallel), ids=("c", "dp"))
def test_a_wrapped_model_takes_the_plain_models_mask(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    twin = copy.deepcopy(model)
    mask = SaliencyMask.from_dict(masks_of(list(model.named_parameters())))
    results = []
    for own in (model, wrap(twin)):
        optimizer = UnlearnOptimizer(own.named_parameters(), rule="adamw", lr=0.01, mask=mask, max_norm=0.1)
        x = torch.linspace(-1, 1, 24).view(4, 6)
        for step in (optimizer.forget_step, optimizer.step, optimizer.forget_step):
            optimizer.zero_grad()
            own(x).square().mean().backward()
            step()
        results.append(own(x).detach())
    # The compiled graph reads the moved weights.
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1], twin(x).detach(), rtol=1e-5, atol=1e-6)
