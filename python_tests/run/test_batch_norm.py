"""Whose batches move batch normalisation's running statistics, and where they are frozen."""

from __future__ import annotations

import pytest
import torch
from helpers.models import batches, make
from helpers.normed import Normed, around
from torch import nn

from unlearn_ext import InputError, NonFiniteError, Unlearner
from unlearn_ext.methods import SFRon, find
from unlearn_ext.tasks import Classification


def run_ascent(model: nn.Module, **changes) -> None:
    method = find("gradient_ascent")(iterations=12, lr=0.02, **changes)
    Unlearner(model, Classification(), method).run(batches(3, 6, seed=1), batches(5, 6, seed=2))


def test_batch_normalisation_is_frozen_for_the_run_alone() -> None:
    for training in (True, False):
        model = make().train(training)
        run_ascent(model)
        assert model.norm.num_batches_tracked == 0 and model.norm.training is training
        run_ascent(model, freeze_batch_norm=False)
        assert model.norm.num_batches_tracked == 12


@pytest.mark.parametrize(
    ("name", "changes", "options"),
    [
        ("sfron", {"forget_freq": 2}, {}),
        ("sfron", {"update": "joint"}, {"gradient_accumulation_steps": 2}),
        ("salun", {"mask_fraction": 0.5}, {"optimizer_in_backward": True}),
        ("bad_teacher", {}, {}),
        ("projected", {}, {}),
    ],
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_statistics_of_retain_batches_alone(name, changes, options, checkpointed) -> None:
    """By hand: 0.9 of what was and 0.1 of each retain batch's mean and variance."""
    forget, retain = around(50.0, 2, seed=1), around(-2.0, 3, seed=2)
    models = []
    for statistics in ("all", "retain"):
        torch.manual_seed(0)
        models.append(model := Normed(checkpointed))
        method = find(name)(iterations=6, lr=1e-3, batch_norm_statistics=statistics, **changes)
        Unlearner(model, Classification(), method, **options).run(forget, retain)
    # In train mode a batch is normalised by its own statistics: no weight depends on where the running ones are.
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert not torch.equal(models[0].norm.running_mean, models[1].norm.running_mean)
    mean, variance = torch.zeros(3), torch.ones(3)
    seen = 6 * options.get("gradient_accumulation_steps", 1) * (1 + checkpointed)
    for x, _ in [batch for batch in retain for _ in range(1 + checkpointed)] * (seen // (3 * (1 + checkpointed))):
        mean, variance = 0.9 * mean + 0.1 * x.mean(0), 0.9 * variance + 0.1 * x.var(0)
    torch.testing.assert_close(model.norm.running_mean, mean)
    torch.testing.assert_close(model.norm.running_var, variance)
    assert model.norm.num_batches_tracked == seen and model.norm.track_running_stats


def test_statistics_of_a_compiled_model() -> None:
    """One graph for each side: the forget side's must not be taken for the retain side's."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Normed()
        method = SFRon(iterations=4, lr=1e-3, batch_norm_statistics="retain")
        unlearner = Unlearner(torch.compile(model, backend="eager") if compiled else model, Classification(), method)
        unlearner.run(around(50.0, 2, seed=1), around(-2.0, 2, seed=2))
        found.append(model.norm)
    assert torch.equal(found[0].running_mean, found[1].running_mean)
    assert found[0].num_batches_tracked == found[1].num_batches_tracked == 4


def test_statistics_of_forget_batches_move_too_unless_told_otherwise() -> None:
    model = Normed()
    Unlearner(model, Classification(), SFRon(iterations=2, lr=1e-3)).run(around(50.0, 2, seed=1), around(-2.0, 2, 2))
    assert model.norm.num_batches_tracked == 4 and bool((model.norm.running_mean > 5).all())


def test_statistics_frozen_before_stay_and_normalise_both_sides() -> None:
    models = []
    for statistics in ("all", "retain"):
        torch.manual_seed(0)
        models.append(model := Normed())
        model.norm.eval()
        model.norm.running_mean.fill_(3.0)
        method = SFRon(iterations=2, lr=1e-3, batch_norm_statistics=statistics)
        Unlearner(model, Classification(), method).run(around(1.0, 2, seed=1), around(-2.0, 2, seed=2))
        assert model.norm.num_batches_tracked == 0 and model.norm.track_running_stats
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_an_error_leaves_batch_normalisation_as_it_was() -> None:
    model, method = Normed(), SFRon(iterations=2, lr=1e-3, batch_norm_statistics="retain")
    broken = [(torch.full((6, 3), torch.nan), torch.zeros(6, dtype=torch.long))]
    with pytest.raises(NonFiniteError):
        Unlearner(model, Classification(), method).run(broken, around(-2.0, 2, seed=2))
    assert model.norm.track_running_stats


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_statistics_that_cannot_be_kept_are_refused() -> None:
    for settings, words in (
        ({"batch_norm_statistics": "none"}, "expected all or retain, got 'none'"),
        ({"batch_norm_statistics": "retain", "freeze_batch_norm": True}, "leave batch_norm_statistics out"),
    ):
        with pytest.raises(InputError, match=words):
            SFRon(**settings)
    for name in ("finetune", "gradient_ascent"):
        with pytest.raises(InputError, match=r"has no (forget|retain) term, and batch_norm_statistics"):
            find(name)(batch_norm_statistics="retain", freeze_batch_norm=False)
    plain = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4))
    traced = torch.jit.trace(plain.train(), torch.randn(6, 3), check_trace=False)
    method = SFRon(iterations=2, gamma=None, batch_norm_statistics="retain")
    for model in (torch.jit.script(plain), traced):
        with pytest.raises(InputError, match="does not reach batch normalisation in a scripted or traced model"):
            Unlearner(model, Classification(), method).run(around(1.0, 2, seed=1), around(-2.0, 2, seed=2))
    run_ascent(scripted_conv := torch.jit.script(make()))
    assert scripted_conv.norm.num_batches_tracked == 0
