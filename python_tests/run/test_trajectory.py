"""The unlearner against the plain float64 transcription of the released algorithm, weight by weight."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import oracles
from helpers.models import ConvNet, WithUnused, batches, make

from unlearn_ext import Unlearner
from unlearn_ext.methods import DOMAINS, SFRon
from unlearn_ext.tasks import Classification

ITERATIONS = 50

RULES = {
    "momentum": {"rule": "momentum", "lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4},
    "adamw": {"rule": "adamw", "lr": 2e-3, "weight_decay": 0.05},
}


def trajectories(settings: dict, model=ConvNet):
    """Weights after every iteration, from the transcription and from the unlearner, and both masks."""
    start = make(model).double()
    # Sets of different lengths, with a last batch that is smaller, so that the two streams wrap at different times.
    forget = batches(3, 8, seed=1, dtype=torch.float64)
    forget[-1] = (forget[-1][0][:3], forget[-1][1][:3])
    retain = batches(5, 8, seed=2, dtype=torch.float64)
    expected, mask = oracles.sfron(start, forget, retain, **settings)

    own = copy.deepcopy(start)
    path: list[torch.Tensor] = []

    def record(model: torch.nn.Module, iteration: int) -> None:
        path.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))

    method = SFRon(betas=(0.9, 0.999), **settings)
    result = Unlearner(own, Classification(), method).run(forget, retain, evaluate=record, evaluate_every=1)
    return expected, path, mask, result


@pytest.mark.parametrize("update", ["sequential", "joint"])
@pytest.mark.parametrize("gamma", [1.0, None])
@pytest.mark.parametrize(("slow_rate", "slow_freq"), [(1.0, 1), (0.7, 3)])
@pytest.mark.parametrize("rule", RULES)
def test_follows_the_released_algorithm(rule, slow_rate, slow_freq, gamma, update) -> None:
    settings = {
        **RULES[rule],
        "iterations": ITERATIONS,
        "forget_freq": 2,
        "forget_alpha": 3.0,
        "lambd": 0.5,
        "gamma": gamma,
        "max_norm": 0.5,
        "slow_rate": slow_rate,
        "slow_freq": slow_freq,
        "lr_schedule": "cosine",
        "forget_schedule": "cosine",
        "update": update,
    }
    expected, path, mask, result = trajectories(settings)
    assert len(path) == ITERATIONS
    worst = max((a - b).abs().max().item() for a, b in zip(expected, path, strict=True))
    assert worst <= 1e-9
    assert (expected[0] - expected[-1]).abs().max() > 0.01, "the weights must have moved for this to mean anything"
    if gamma is None:
        assert result.mask is None
    else:
        unpacked = result.mask.unpack()
        assert all(torch.equal(unpacked[name], mask[name]) for name in mask)
        assert 0.05 < result.mask.density < 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"lambd": 0.0},
        {"forget_schedule": "linear", "lr_schedule": "constant"},
        {"forget_schedule": "quadratic", "lr_schedule": "linear"},
        {"forget_schedule": "constant", "retain_max_norm": 0.1},
        {"max_norm": None, "adaptive_eps": 1e-2},
        {"gamma": 3.0, "fisher_eps": 1e-8},
        {"forget_freq": 1, "slow_rate": 0.3, "slow_freq": 1},
    ],
    ids=str,
)
def test_follows_it_for_other_settings(change) -> None:
    settings = {**RULES["momentum"], "iterations": ITERATIONS, "forget_freq": 3, "forget_alpha": 0.2, "max_norm": 0.5}
    settings |= {"lr_schedule": "cosine", "forget_schedule": "cosine"} | change
    expected, path, _, _ = trajectories(settings)
    assert max((a - b).abs().max().item() for a, b in zip(expected, path, strict=True)) <= 1e-9


def test_a_weight_without_gradient_is_left_alone_and_kept_out_of_the_mask() -> None:
    settings = {**RULES["momentum"], "iterations": 10, "forget_freq": 1, "forget_alpha": 1.0, "max_norm": 1.0}
    settings |= {"lr_schedule": "cosine", "forget_schedule": "cosine"}
    expected, path, mask, result = trajectories(settings, WithUnused)
    assert (expected[-1] - path[-1]).abs().max() <= 1e-9
    assert not mask["unused"].any() and not result.mask.unpack()["unused"].any()


@pytest.mark.parametrize("name", sorted(SFRon.presets.keys() - DOMAINS.keys()))
def test_presets_of_classifiers_follow_it_too(name) -> None:
    """The released settings, shortened to 50 iterations; the schedules are relative to the length."""
    settings = SFRon.presets[name]
    expected, path, _, _ = trajectories({**settings, "iterations": 50})
    assert max((a - b).abs().max().item() for a, b in zip(expected, path, strict=True)) <= 1e-9
