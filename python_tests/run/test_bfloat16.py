"""Whole runs whose weights are bfloat16 and have no float32 copy: stochastic rounding, its seed, and resuming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.layouts import same_bits
from helpers.models import batches, make
from torch import Tensor, nn

from unlearn_ext import InputError, Unlearner
from unlearn_ext.methods import SFRon
from unlearn_ext.tasks import Classification

WEIGHTS, LR, ITERATIONS = 20000, 2.0**-12, 16


def linear(dtype: torch.dtype) -> nn.Module:
    """Its weights are its logits for an input of 1: of 1.5, where the next bfloat16 is 2^-7 away."""
    model = nn.Linear(1, WEIGHTS, bias=False).to(dtype)
    nn.init.constant_(model.weight, 1.5)
    return model


def drift(dtype: torch.dtype, stochastic: bool, seed: int = 0, in_backward: bool = False) -> Tensor:
    """What becomes of the weights where every retain step takes 2^-12 off each, and every forget step adds half."""
    torch.manual_seed(seed)
    model = linear(dtype)
    task = Classification(loss=lambda logits, labels: logits.float().sum(1))
    method = SFRon(
        rule="sgd",
        lr=LR,
        iterations=ITERATIONS,
        forget_alpha=0.5,
        forget_schedule="constant",
        lambd=0.0,
        gamma=None,
        stochastic_rounding=stochastic,
    )
    data = {name: [(torch.ones(1, 1, dtype=dtype), torch.zeros(1).long())] for name in ("forget", "retain")}
    Unlearner(model, task, method, optimizer_in_backward=in_backward).run(**data, allow_duplicates=True)
    return model.weight.detach().double().flatten()


@pytest.mark.parametrize("in_backward", (False, True))
def test_a_run_in_bfloat16_goes_where_float32_goes_on_average(in_backward: bool) -> None:
    exact = 1.5 - ITERATIONS * LR * 0.5
    assert torch.equal(drift(torch.float32, False), torch.full((WEIGHTS,), exact, dtype=torch.float64))
    found = drift(torch.bfloat16, True, in_backward=in_backward)
    error = float(found.std()) / WEIGHTS**0.5
    assert error < 0.05 * (1.5 - exact), "too few weights to tell"
    assert abs(float(found.mean()) - exact) < 3 * error
    nearest = drift(torch.bfloat16, False, in_backward=in_backward)
    assert torch.equal(nearest, torch.full_like(nearest, 1.5)), "rounding to nearest loses every step"
    assert torch.equal(found, drift(torch.bfloat16, True, in_backward=in_backward))
    assert not torch.equal(found, drift(torch.bfloat16, True, seed=1, in_backward=in_backward))


@pytest.mark.parametrize("in_backward", (False, True))
@pytest.mark.parametrize("settings", [{"rule": "adamw", "slow_rate": 0.5, "slow_freq": 2}, {"rule": "momentum"}])
def test_a_run_in_bfloat16_is_resumed_to_the_bit(settings: dict, in_backward: bool, tmp_path: Path) -> None:
    data = [
        [(images.bfloat16(), labels) for images, labels in batches(count, 6, seed=seed)]
        for count, seed in ((3, 1), (5, 2))
    ]

    def run(**arguments) -> dict[str, Tensor]:
        model = make(dropout=0.3).to(torch.bfloat16)
        torch.manual_seed(5)
        method = SFRon(**{"lr": 0.01, "iterations": 6, "gamma": 0.9, "stochastic_rounding": True, **settings})
        unlearner = Unlearner(model, Classification(), method, optimizer_in_backward=in_backward)
        unlearner.run(*data, **arguments)
        return model.state_dict()

    whole = run()
    written = run(output_dir=tmp_path, checkpointing_steps=4)
    torch.rand(3)
    resumed = run(output_dir=tmp_path, resume_from_checkpoint="latest")
    for name, value in whole.items():
        assert same_bits(value, written[name]) and same_bits(value, resumed[name]), name
        assert value.dtype == (torch.int64 if name.endswith("tracked") else torch.bfloat16)
    saved = json.loads((tmp_path / "checkpoint-4" / "state.json").read_text())
    assert saved["settings"]["stochastic_rounding"] is True
    assert not all(same_bits(value, make().to(torch.bfloat16).state_dict()[name]) for name, value in whole.items())


def test_stochastic_rounding_needs_weights_to_round() -> None:
    with pytest.raises(InputError, match=r"stochastic_rounding is for bfloat16 weights, and the model trains none: .*"):
        Unlearner(make(), Classification(), SFRon(stochastic_rounding=True))
