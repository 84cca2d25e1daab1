"""Gradient accumulation and moving averages."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers.models import batches, make
from torch import nn

from unlearn_ext import InputError, NonFiniteError, Unlearner
from unlearn_ext.methods import SFRon
from unlearn_ext.tasks import Classification

SETTINGS = {"rule": "adamw", "lr": 0.01, "iterations": 5, "max_norm": 0.05, "gamma": None, "lr_schedule": "cosine"}


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def data(number: int, size: int, seed: int, dtype: torch.dtype = torch.float64) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 4, generator=generator).to(dtype), torch.randint(3, (size,), generator=generator))
        for _ in range(number)
    ]


def joined(parts: list, sizes: int) -> list:
    return [
        tuple(torch.cat(tensors) for tensors in zip(*parts[i : i + sizes], strict=True))
        for i in range(0, len(parts), sizes)
    ]


@pytest.mark.parametrize("update", ["sequential", "joint"])
def test_accumulated_batches_make_the_step_of_one_large_batch(update: str) -> None:
    """Also of unequal forget batches, and with adaptive weights, which are normalised over the whole."""
    forget = [part for pair in zip(data(5, 4, 1), data(5, 7, 2), data(5, 1, 3), strict=True) for part in pair]
    retain = data(15, 6, 4)
    models, histories = [], []
    for steps in (3, 1):
        model = net()
        method = SFRon(**SETTINGS, forget_alpha=2.0, lambd=1.5, adaptive_eps=1e-3, update=update)
        unlearner = Unlearner(model, Classification(), method, gradient_accumulation_steps=steps)
        sets = (
            {"forget": forget, "retain": retain}
            if steps > 1
            else {"forget": joined(forget, 3), "retain": joined(retain, 3)}
        )
        histories.append(unlearner.run(**sets, allow_duplicates=True).history)
        models.append(model)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    start = net()
    assert any(not torch.equal(a, b) for a, b in zip(models[0].parameters(), start.parameters(), strict=True))
    assert all(entry["clip"] < 1 for entry in histories[1][:3])
    for accumulated, large in zip(*histories, strict=True):
        assert accumulated["largest_share"] == pytest.approx(large["largest_share"], rel=1e-9)
        assert accumulated["clip"] == pytest.approx(large["clip"], rel=1e-9)
        assert accumulated["retain_loss"] == pytest.approx(large["retain_loss"], rel=1e-9)


def test_a_sample_that_is_remembered_perfectly_does_not_overflow_what_is_accumulated() -> None:
    """Its weight is 1 / adaptive_eps = 1e15."""
    model = net(torch.float32)
    with torch.no_grad():
        model[3].bias.copy_(torch.tensor([200.0, 0.0, 0.0]))  # label 0: a cross-entropy of exactly 0
    forget = [
        (x, torch.full_like(y, label)) for (x, y), label in zip(data(4, 3, 1, torch.float32), (1, 0, 1, 0), strict=True)
    ]
    method = SFRon(**{**SETTINGS, "iterations": 2}, forget_alpha=2.0)
    result = Unlearner(model, Classification(), method, gradient_accumulation_steps=2).run(
        forget, data(4, 3, 2, torch.float32), allow_duplicates=True
    )
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert result.history[0]["largest_share"] == pytest.approx(1 / 3, rel=1e-3)  # of the three perfect samples


def test_a_loss_that_is_not_finite_in_a_later_batch_changes_nothing() -> None:
    forget = data(2, 3, 1)
    forget[1][0][0, 0, 0] = torch.nan
    model = net()
    before = [p.clone() for p in model.parameters()]
    unlearner = Unlearner(model, Classification(), SFRon(**SETTINGS), gradient_accumulation_steps=2)
    with pytest.raises(NonFiniteError, match="iteration 0: the forget loss"):
        unlearner.run(forget, data(2, 3, 2), allow_duplicates=True)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_averages_follow_the_weights() -> None:
    model, decay = net(torch.bfloat16), 0.9
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}

    def watch(_: nn.Module, iteration: int) -> None:
        for name, p in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()

    sets = {"forget": data(2, 3, 1, torch.bfloat16), "retain": data(2, 3, 2, torch.bfloat16)}
    unlearner = Unlearner(model, Classification(), SFRon(**SETTINGS), ema_decay=decay)
    result = unlearner.run(**sets, evaluate=watch, evaluate_every=1, allow_duplicates=True)
    assert result.ema.keys() == expected.keys()
    for name, average in result.ema.items():
        assert average.dtype == torch.float32  # in bfloat16 a share of 0.1 would be lost
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-6, atol=1e-7)
    assert Unlearner(net(), Classification(), SFRon(**SETTINGS)).run(data(2, 3, 1), data(2, 3, 2)).ema is None


def test_a_resumed_run_has_the_same_weights_and_averages(tmp_path) -> None:
    def run(model, iterations=6, **arguments):
        method = SFRon(**{**SETTINGS, "iterations": 6, "rule": "momentum", "momentum": 0.9})
        unlearner = Unlearner(model, Classification(), method, ema_decay=0.5, gradient_accumulation_steps=2)
        stop = {"evaluate": lambda _, i: i == iterations, "evaluate_every": iterations} if iterations < 6 else {}
        return unlearner.run(batches(5, 6, seed=1), batches(7, 6, seed=2), **stop, **arguments)

    whole, cut = make(), make()
    expected = run(whole)
    run(cut, output_dir=tmp_path, checkpointing_steps=3)
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = make()
    with torch.no_grad():
        for p in resumed.parameters():
            p.add_(1.0)  # the checkpoint's weights count, not these
    result = run(resumed, output_dir=tmp_path, resume_from_checkpoint="latest")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(result.ema[name], average) for name, average in expected.ema.items())


@pytest.mark.parametrize("changes", [{"ema_decay": None}, {"gradient_accumulation_steps": 3}])
def test_a_run_of_other_settings_is_not_resumed(tmp_path, changes: dict) -> None:
    settings = {"ema_decay": 0.5, "gradient_accumulation_steps": 2}
    sets = {"forget": batches(4, 6, seed=1), "retain": batches(4, 6, seed=2)}
    method = SFRon(**SETTINGS)
    Unlearner(make(), Classification(), method, **settings).run(**sets, output_dir=tmp_path, checkpointing_steps=2)
    other = Unlearner(make(), Classification(), method, **{**settings, **changes})
    with pytest.raises(InputError, match=next(iter(changes))):
        other.run(**sets, output_dir=tmp_path, resume_from_checkpoint="latest")


def test_averages_that_are_missing_are_said_to_be(tmp_path) -> None:
    unlearner = Unlearner(make(), Classification(), SFRon(**SETTINGS), ema_decay=0.5)
    sets = {"forget": batches(4, 6, seed=1), "retain": batches(4, 6, seed=2)}
    unlearner.run(**sets, output_dir=tmp_path, checkpointing_steps=5)
    (tmp_path / "checkpoint-5" / "ema.safetensors").unlink()
    with pytest.raises(InputError, match=r"damaged: its ema\.safetensors is missing"):
        unlearner.run(**sets, output_dir=tmp_path, resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    "changes", [{"ema_decay": 1.0}, {"ema_decay": -0.1}, {"ema_decay": "x"}, {"gradient_accumulation_steps": 0}]
)
def test_settings_out_of_range_are_refused(changes: dict) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        Unlearner(make(), Classification(), SFRon(**SETTINGS), **changes)
