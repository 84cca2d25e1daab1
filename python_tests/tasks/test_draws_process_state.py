"""What a diffusion task draws is the same numbers in whatever state the process is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from helpers.process_state import STATES, Around
from torch import Tensor

from unlearn_ext.tasks import ClassConditionalDiffusion
from unlearn_ext.tasks._noise import NoiseSchedule

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "antithetic and dropped": {"antithetic": True, "label_dropout": 0.5},
}


def draws(options: dict[str, Any], batch: dict[str, Tensor], scheduler: Any) -> list[dict[str, Tensor]]:
    task = ClassConditionalDiffusion(scheduler, null_label=4, seed=3, **options)
    return [task.prepare(batch, torch.device("cpu")) for _ in range(2)]


def raw(latents: bool) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 2])
    if not latents:
        return {"pixel_values": torch.randn(3, 1, 4, 4, generator=rng).clamp(-1, 1), "labels": labels}
    mean, std = torch.randn(2, 3, 4, 4, 4, generator=rng)
    return {"latent_mean": mean, "latent_std": std.abs(), "labels": labels}


@pytest.mark.parametrize("latents", (False, True), ids=("images", "latents"))
@pytest.mark.parametrize("around", STATES.values(), ids=STATES.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_draws_do_not_depend_on_the_process(options: dict[str, Any], around: Around, latents: bool) -> None:
    batch, scheduler = raw(latents), DDPMScheduler(10)
    expected = draws(options, batch, scheduler)
    with around():
        got = draws(options, batch, scheduler)
    assert not torch.equal(expected[0]["noise"], expected[1]["noise"])
    for a, b in zip(expected, got, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("around", STATES.values(), ids=STATES.keys())
def test_the_schedule_does_not_depend_on_the_process(around: Around) -> None:
    scheduler = DDPMScheduler(10)
    x, noise, at = *torch.randn(2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 5, 9])

    def tables() -> list[Tensor]:
        schedule = NoiseSchedule(scheduler)
        names = ("signal", "noise", "posterior_sample", "posterior_noisy", "posterior_log_variance", "log_beta")
        return [schedule.add(x, noise, at), *(schedule.at(name, at, x) for name in names)]

    expected = tables()
    with around():
        got = tables()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(expected, got, strict=True))
