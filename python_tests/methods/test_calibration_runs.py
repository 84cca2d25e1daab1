"""Calibrated runs: where they look, where they end, and what looks leave as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import denoisers
from helpers.calibrated import SHORT, run, sets
from helpers.models import batches, make
from torch import nn

from unlearn_ext import NonFiniteError, Unlearner
from unlearn_ext.data.shuffled import ShuffledBatches
from unlearn_ext.methods import UGCLU, GradientAscent, NegativeGradientPlus, Projected, SFRon, parse
from unlearn_ext.methods.calibration import UnseenLosses
from unlearn_ext.tasks import ClassConditionalDiffusion, Classification

ASCENDING = [SFRon, GradientAscent, NegativeGradientPlus, Projected, UGCLU]


class Scripted(UnseenLosses):
    """Looks with the scores of a script."""

    scores: tuple[float, ...] = ()
    met_at: int | None = None

    def look(self, iteration, forget, unseen):
        entry = super().look(iteration, forget, unseen)
        entry.update(score=self.scores[len(self.path) - 1], met=len(self.path) == self.met_at)
        return entry


@pytest.mark.parametrize("method", ASCENDING, ids=lambda m: m.name)
def test_every_ascending_method_can_be_calibrated(method) -> None:
    data = sets()
    if not method.retains:
        data = {**data, "retain": None}
    if method.learns:
        data = {**data, "learn": batches(2, 6, seed=7)}
    method = method(**SHORT)
    method.calibration = Scripted(2, 16)  # noise in an untrained network looks like unseen data at once
    method.calibration.scores = (0.4, 0.3, 0.2, 0.1)
    model, result = run(method, data)
    assert [entry["iteration"] for entry in result.calibration["path"]] == [0, 2, 4, 6]
    assert result.calibration["ended_at"] == 6
    logged = [entry for entry in result.history if "calibration" in entry]
    assert [entry["iteration"] for entry in logged] == [1, 3, 5]
    assert logged[0]["calibration"]["distance"] == result.calibration["path"][1]["distance"]
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), make().parameters(), strict=True))


def test_it_is_text_as_well() -> None:
    method = parse("sfron:forget_alpha=auto,iterations=3")
    assert method.needs_unseen and method.settings()["forget_alpha"] == "auto"
    assert not parse("sfron:forget_alpha=5").needs_unseen and not SFRon.needs_unseen


@pytest.mark.filterwarnings("ignore:calibration found nothing better")
@pytest.mark.parametrize(
    ("scores", "end"),
    [
        ((1, 0.9, 0.1, 0.9), 4),
        ((1, 0.9, 0.5, 0.1), 6),
        ((1, 0.9, 0.1, 0.2), 4),
        ((1, 0.1, 0.1, 0.9), 4),
        ((0.1, 0.2, 0.9, 0.2), 0),  # the starting weights are a point as well
    ],
)
def test_it_goes_back_to_the_best_point_rather_than_end_worse(scores, end) -> None:
    method, kept = SFRon(**SHORT), {0: copy.deepcopy(make().state_dict())}
    method.calibration = Scripted(2, 16)
    method.calibration.scores = scores

    def keep(model: nn.Module, done: int) -> None:
        kept[done] = copy.deepcopy(model.state_dict())

    model, result = run(method, evaluate=keep, evaluate_every=2)
    assert result.calibration["ended_at"] == end and result.calibration["went_back"] == (end != 6)
    state = model.state_dict()
    for name, tensor in kept[end].items():
        assert torch.equal(state[name], tensor), name
    if end != 6:
        assert not all(torch.equal(state[name], tensor) for name, tensor in kept[6].items())


def test_what_met_the_target_goes_before_a_smaller_score() -> None:
    method = SFRon(**SHORT)
    method.calibration = Scripted(2, 16)
    method.calibration.scores, method.calibration.met_at = (0.6, 0.1, 0.2), 3
    _, result = run(method)
    assert result.calibration["ended_at"] == result.stopped_at == 4 and result.calibration["met"]


def test_where_nothing_is_better_than_the_start_it_warns() -> None:
    method = SFRon(**SHORT)
    method.calibration = Scripted(2, 16)
    method.calibration.scores = (0.1, 0.6, 0.5, 0.2)
    with pytest.warns(UserWarning, match="nothing was forgotten: change lr, raise iterations"):
        model, _ = run(method)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), make().state_dict().values(), strict=True)
    )


class Ruined(Scripted):
    def look(self, iteration, forget, unseen):
        if iteration == 4:
            raise NonFiniteError("a loss on unseen data is not finite")
        return super().look(iteration, forget, unseen)


def test_a_model_that_is_ruined_goes_back_before_the_run_ends() -> None:
    method, kept = SFRon(**SHORT), {}
    method.calibration = Ruined(2, 16)
    method.calibration.scores = (0.6, 0.5)
    model = make()

    def keep(net: nn.Module, done: int) -> None:
        kept[done] = copy.deepcopy(net.state_dict())

    with pytest.raises(NonFiniteError, match=r"^after iteration 3: .* gone back to its weights after 2 iterations"):
        run(method, model=model, evaluate=keep, evaluate_every=2)
    assert all(torch.equal(tensor, kept[2][name]) for name, tensor in model.state_dict().items())


def test_a_model_that_is_ruined_when_an_evaluation_ends_the_run_goes_back_too() -> None:
    method = SFRon(**{**SHORT, "calibrate_every": 6})
    method.calibration = Ruined(6, 16)
    method.calibration.scores = (0.6,)
    model = make()
    with pytest.raises(NonFiniteError, match=r"^after iteration 3: .* gone back to its weights after 0 iterations"):
        run(method, model=model, evaluate=lambda net, done: True, evaluate_every=4)
    start = make().state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("freq", "forget", "unseen", "looked"),
    [
        # 20 iterations on batches of 8 and looks at 32 samples: 320, 240 or 200 samples trained on, each for two
        # passes, pay for 4, 3 or 2 looks, that at the start being one.
        (1, [8, 8, 8], [8] * 4, [0, 7, 14, 20]),
        (2, [8, 8, 8], [8] * 4, [0, 10, 20]),
        (4, [8, 8, 8], [8] * 4, [0, 20]),
        # Batches are taken whole: looks at 24 + 40 samples, of 40 * 20 trained on, 960 with batches of 24.
        (1, [24], [40], [0, 4, 8, 12, 16, 20]),
        # 6 samples in a forget batch on average, 8 in a retain batch: 280 pay for 4 looks at 12 + 16.
        (1, [8, 4], [8, 8], [0, 7, 14, 20]),
        # 8 and 12: 400, and looks at 16 + 20: 4.4; with 12 and 12 it would be 5.3.
        (1, [12, 4], [12, 8], [0, 7, 14, 20]),
    ],
)
def test_without_a_spacing_looks_cost_a_fifth_of_the_training(freq, forget, unseen, looked) -> None:
    def cut(sizes: list[int], seed: int) -> list:
        (whole,) = batches(1, sum(sizes), seed=seed)
        return list(zip(*(part.split(sizes) for part in whole), strict=True))

    method = SFRon(**{**SHORT, "iterations": 20, "calibrate_every": None, "forget_freq": freq})
    method.calibration = Scripted(None, 16)
    method.calibration.scores = (0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
    for _ in range(2):  # a method keeps nothing of a run for the next
        data = {"forget": cut(forget, 1), "retain": batches(5, 8, seed=2), "unseen": cut(unseen, 6)}
        _, result = run(method, data)
        assert [entry["iteration"] for entry in result.calibration["path"]] == looked


def test_the_start_is_no_damage() -> None:
    data = {**sets(), "unseen": batches(9, 8, seed=20)}  # more than a look takes
    for settings in ({}, {"target_accuracy": 0.0}):
        method = SFRon(**{**SHORT, **settings})
        _, result = run(method, data)
        start = result.calibration["path"][0]
        assert start["score"] == (start["accuracy"] if settings else start["distance"])


def test_a_look_takes_no_more_samples_than_it_uses() -> None:
    task, seen = Classification(), []
    losses = task.losses

    def counted(model, batch):
        if not model.training:
            seen.append(len(batch[1]))
        return losses(model, batch)

    task.losses = counted
    method = SFRon(**{**SHORT, "gamma": None})
    method.calibration = Scripted(2, 16)
    method.calibration.scores = (0.4, 0.3, 0.2, 0.1)
    data = {**sets(), "forget": batches(3, 8, seed=1), "unseen": batches(12, 8, seed=6)}
    Unlearner(make(), task, method).run(**data)
    assert sum(seen) == 4 * (16 + 16)


def test_it_stops_when_it_is_met() -> None:
    method = SFRon(**SHORT)
    method.calibration = Scripted(2, 16)
    method.calibration.scores, method.calibration.met_at = (0.6, 0.5, 0.2, 0.1), 3
    _, result = run(method)
    assert result.stopped_at == 4 and result.counts["iterations"] == 4
    assert result.calibration["met"] and result.calibration["ended_at"] == 4


def test_a_run_that_an_evaluation_stops_is_looked_at_once_more() -> None:
    for every in (2, 5):
        method = SFRon(**{**SHORT, "calibrate_every": every})
        method.calibration = Scripted(every, 16)
        method.calibration.scores = (0.4, 0.3, 0.2)
        _, result = run(method, evaluate=lambda model, done: True, evaluate_every=3)
        assert result.stopped_at == 3 and result.calibration["ended_at"] == 3
        assert [entry["iteration"] for entry in result.calibration["path"]] == ([0, 2, 3] if every == 2 else [0, 3])


def test_looks_do_not_disturb_the_run() -> None:
    """However many there are, the run draws the same batches, and normalisation keeps the statistics of its steps."""
    found = []
    for every in (1, 4):
        data = sets()
        images, labels = (torch.cat(part) for part in zip(*data["forget"], strict=True))
        data["forget"] = ShuffledBatches(images, labels, 6, seed=0)
        method = SFRon(**{**SHORT, "iterations": 4, "calibrate_every": every, "lr": 1e-12})
        method.calibration = Scripted(every, 16)
        method.calibration.scores = (0.5, 0.4, 0.3, 0.2, 0.1)
        model, _ = run(method, data)
        found.append((data["forget"].generator.get_state(), model.norm.running_mean.clone()))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-7)


def test_looks_leave_a_loader_with_workers_at_its_place() -> None:
    """Such a loader has one pass at a time: a look that began another would let training begin anew with it."""
    x = torch.randn(24, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(x, torch.arange(24) % 4)
    seen = []
    task = Classification()
    prepare = task.prepare

    def noted(batch, device):
        if model.training:
            seen.append(batch[0])
        return prepare(batch, device)

    task.prepare = noted
    model = make()
    loader = torch.utils.data.DataLoader(data, 4, num_workers=1, persistent_workers=True)
    method = GradientAscent(**{**SHORT, "calibrate_every": 1})
    method.calibration = Scripted(1, 16)
    method.calibration.scores = tuple(1 - 0.1 * i for i in range(7))
    Unlearner(model, task, method).run(loader, unseen=sets()["unseen"])
    assert torch.equal(torch.cat(seen[-6:]), x), "one pass, in order"


def test_a_diffusion_model_is_looked_at_under_the_same_noise() -> None:
    data = {
        name: [(denoisers.images(8, seed=i), denoisers.labels(8, seed=i)) for i in (n, n + 1)]
        for n, name in ((0, "forget"), (2, "retain"))
    }
    data["unseen"] = [(denoisers.images(8, seed=i), denoisers.labels(8, seed=i)) for i in (4, 5)]
    net = denoisers.unet()
    task = ClassConditionalDiffusion(denoisers.scheduler(), label_dropout=0.5)
    method = SFRon(**{**SHORT, "lr": 1e-12, "rule": "sgd"})
    method.calibration = Scripted(2, 16)
    method.calibration.scores = (0.4, 0.3, 0.2, 0.1)
    result = Unlearner(net, task, method).run(**data)
    losses = [entry["unseen_loss"] for entry in result.calibration["path"]]
    assert losses[1:] == pytest.approx([losses[0]] * 3, rel=1e-5) and losses[0] > 0.01


def test_averages_go_back_as_well() -> None:
    found = {}
    for scores, iterations in (((1, 0.9, 0.1, 0.9), 6), ((1, 0.9, 0.1), 4)):
        method = SFRon(**{**SHORT, "iterations": iterations})
        method.calibration = Scripted(2, 16)
        method.calibration.scores = scores
        _, result = run(method, ema=0.5)
        assert result.calibration["ended_at"] == 4
        found[iterations] = result.ema
    for name, tensor in found[4].items():
        assert torch.equal(found[6][name], tensor), name
