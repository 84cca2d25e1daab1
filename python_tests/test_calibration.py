"""Calibrated forgetting: strengths and looks against plain formulas, what it does on digits, and what it refuses."""

from __future__ import annotations

import copy
import itertools
import math

import denoisers
import numpy
import pytest
import torch
from models import batches, make
from scipy.stats import ks_2samp
from test_method_updates import CLOSE, STEPS, distance, rounds
from test_method_updates import sets as two_sets
from test_methods_on_digits import digits, measured  # noqa: F401 - a fixture
from torch import nn
from torch.nn.functional import cross_entropy

from unlearn_ext import InputError, NonFiniteError, Unlearner
from unlearn_ext.demo.batches import ShuffledBatches
from unlearn_ext.methods import UGCLU, GradientAscent, NegativeGradientPlus, Projected, RandomLabel, SFRon, parse
from unlearn_ext.methods.calibration import TargetAccuracy, UnseenLosses, spacing
from unlearn_ext.tasks import ClassConditionalDiffusion, Classification, Task

ASCENDING = [SFRon, GradientAscent, NegativeGradientPlus, Projected, UGCLU]
SHORT = {"forget_alpha": "auto", "iterations": 6, "lr": 0.02, "calibrate_every": 2, "calibration_samples": 16}


def losses(count: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4


def sets() -> dict[str, list]:
    return {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2), "unseen": batches(4, 6, seed=6)}


def run(method, data: dict | None = None, model: nn.Module | None = None, ema: float | None = None, **arguments):
    model = make() if model is None else model
    return model, Unlearner(model, Classification(), method, ema_decay=ema).run(**(data or sets()), **arguments)


# --- Formulas -------------------------------------------------------------------------------------------------


def test_strengths_lead_to_the_unseen_sample_of_the_same_rank() -> None:
    own, unseen = losses(10, 0, 0.01), losses(50, 1)
    calibration = UnseenLosses(5, 64)
    calibration.start(unseen)
    found = calibration.strengths(own)
    order = own.argsort().tolist()
    sorted_logs = numpy.sort(numpy.log(unseen.numpy() + 1e-6))
    for i, loss in enumerate(own.tolist()):
        target = numpy.quantile(sorted_logs, (order.index(i) + 0.5) / 10)
        expected = 0.1 * (target + 2.0 - math.log(loss + 1e-6)) / (loss + 1e-6)
        assert found[i].item() == pytest.approx(expected, rel=1e-12)
    # A sample above its target comes down.
    high = torch.full((4,), 100.0, dtype=torch.float64)
    assert (calibration.strengths(high) < 0).all()


def test_its_gradient_is_that_of_distances_of_logarithms() -> None:
    method = SFRon(**SHORT)
    method.calibration.start(losses(50, 1))
    own = losses(8, 2, 0.1).requires_grad_()
    method.forget_loss(own, 0).loss.backward()
    ranks = own.detach().argsort().argsort()
    logs = (own.detach() + 1e-6).log()
    targets = torch.from_numpy(numpy.quantile(numpy.log(losses(50, 1).numpy() + 1e-6), (ranks.numpy() + 0.5) / 8))
    again = own.detach().clone().requires_grad_()
    (0.05 * ((targets + 2.0 - (again + 1e-6).log()) ** 2)).mean().backward()
    torch.testing.assert_close(own.grad, again.grad, rtol=1e-12, atol=0.0)
    assert (targets + 2.0 > logs).any()


def test_a_look_against_scipy_and_numpy() -> None:
    forget, unseen = losses(60, 3, 0.2), losses(90, 4)
    calibration = UnseenLosses(5, 90)
    calibration.start(losses(90, 5))
    entry = calibration.look(5, forget, unseen)
    assert entry["distance"] == pytest.approx(ks_2samp(forget.numpy(), unseen.numpy()).statistic, abs=1e-12)
    at = (numpy.arange(200) + 0.5) / 200
    logs = [numpy.quantile(numpy.log(own.numpy() + 1e-6), at) for own in (unseen, forget)]
    assert entry["difference"] == pytest.approx((logs[0] - logs[1]).mean(), rel=1e-12)
    assert entry["shift"] == 2.0 and calibration.shift == pytest.approx(min(4.0, 2.0 + entry["difference"]))
    assert entry["iteration"] == 5 and not entry["met"] and calibration.path == [entry]
    assert UnseenLosses.critical(60, 90) == pytest.approx(1.36 * math.sqrt(1 / 60 + 1 / 90))
    # Ruined: unseen losses ten times as large, at which both sets look alike.
    ruined = calibration.look(10, 10 * losses(90, 5), 10 * losses(90, 5))
    assert ruined["distance"] == 0.0 and not ruined["met"]
    before, after = ((scale * losses(90, 5) < math.log(2)).double().mean().item() for scale in (1, 10))
    assert ruined["unseen_sure"] == after < before - 0.2
    assert ruined["score"] == pytest.approx(math.log(10) - math.log(2.5) + before - after, abs=1e-3)
    alike = calibration.look(15, losses(90, 5), losses(90, 5))
    assert alike["met"] and alike["score"] == 0.0
    for _ in range(9):
        calibration.look(20, losses(90, 5), 1e-3 * losses(90, 5))
    assert calibration.shift == 0.0


@pytest.mark.parametrize(
    ("target", "targets"), [(0.0, (2.8, 2.8, 2.8, 2.8)), (0.5, (None, None, 2.8, 2.8)), (1.0, (None,) * 4)]
)
def test_strengths_lead_to_a_loss_that_is_wrong(target, targets) -> None:
    calibration = TargetAccuracy(5, 16, target)
    calibration.start(torch.ones(16), math.log(10.0))
    calibration.shift = 0.25
    wrong = math.log(math.log(10.0)) + 0.25
    own = torch.tensor([0.001, 0.02, 0.5, 2.0], dtype=torch.float64)
    for loss, found, to in zip(own.tolist(), calibration.strengths(own).tolist(), targets, strict=True):
        expected = 0.0 if to is None else 0.1 * (wrong - math.log(loss + 1e-6)) / (loss + 1e-6)
        assert found == pytest.approx(expected, rel=1e-12)
    assert (calibration.strengths(torch.full((4,), 50.0)) == 0).all(), "wrong enough: left where it is"


def test_a_look_at_accuracies() -> None:
    calibration = TargetAccuracy(5, 20, 0.1)
    hits = torch.tensor([1.0] * 15 + [0.0] * 5)
    calibration.start(hits, math.log(10.0))
    entry = calibration.look(5, torch.tensor([1.0] * 9 + [0.0]), torch.tensor([1.0] * 13 + [0.0] * 7))
    assert entry == {
        "iteration": 5, "shift": 2.0, "accuracy": pytest.approx(0.9), "unseen_accuracy": pytest.approx(0.65),
        "score": pytest.approx(0.8 + 0.1), "met": False,
    }  # fmt: skip
    assert calibration.shift == pytest.approx(2.0 + 3 * 0.8)
    better = calibration.look(10, torch.tensor([1.0] + [0.0] * 9), torch.tensor([1.0] * 19 + [0.0]))
    assert better["met"] and better["score"] == pytest.approx(0.0)
    below = calibration.look(15, torch.zeros(10), hits)
    assert (
        not below["met"] and below["score"] == pytest.approx(0.1) and calibration.shift == pytest.approx(4.4 - 3 * 0.1)
    )


def test_no_run_ends_where_unseen_samples_are_got_wrong() -> None:
    """Both sets alike, at the price of three samples of a hundred: too much to stop, and it counts in the score."""
    for wrong, met in ((2, True), (3, False)):
        unseen = losses(100, 1, 0.5)
        calibration = UnseenLosses(5, 100)
        calibration.start(unseen)
        worse = unseen.clone()
        worse[:wrong] = 0.7
        entry = calibration.look(5, worse, worse)
        assert entry["met"] is met and entry["score"] == pytest.approx(wrong / 100)


def test_few_samples_meet_a_target_as_well_as_they_can() -> None:
    for n, target in ((25, 0.5), (16, 0.0), (3, 0.5)):
        calibration = TargetAccuracy(5, 16, target)
        hits = torch.tensor([1.0] * 15 + [0.0])
        calibration.start(hits, math.log(10.0))
        right = math.floor(target * n)
        forget = torch.tensor([1.0] * right + [0.0] * (n - right))
        assert not calibration.look(0, forget, hits)["met"], "the start has not forgotten"
        assert calibration.look(5, forget, torch.tensor([1.0] * 14 + [0.0] * 2))["met"]
        assert not calibration.look(10, forget, torch.tensor([1.0] * 13 + [0.0] * 3))["met"]
        assert not calibration.look(15, torch.tensor([1.0] * (right + 2) + [0.0] * (n - right - 2)), hits)["met"]


@pytest.mark.parametrize(
    ("iterations", "trained", "looked", "every"),
    [
        (30, 30 * 2 * 64, 456, 15),  # 3 looks of 456, 1,368, within 0.2 * 7,680; one more would be 1,824
        (300, 300 * 2 * 64, 456, 10),  # 33 fit, the start's included, with 32 others: 300 / 32, rounded up
        (30, 30 * 64, 456, 30),  # not even the end's fits
        (7, 7 * 2 * 1000, 100, 1),
    ],
)
def test_looks_are_spaced_by_their_cost(iterations, trained, looked, every) -> None:
    assert spacing(iterations, trained, looked) == every


# --- 20 steps against plain PyTorch ---------------------------------------------------------------------------

UNSEEN = batches(9, 8, seed=20, dtype=torch.float64)
SETTINGS = "rule=momentum,lr=0.05,momentum=0.9,forget_freq=1,gamma=none,forget_alpha=auto,calibrate_every=4"
SHIFTS: dict[str, list[float]] = {}


def steps_of(net, forget, retain, optimizer, strengths, shifts, look, target: float, bounds, pull: float):
    """Forget and retain steps, and a shift that looks move."""
    shift = bounds[1]
    for t, ((x, y), (u, v)) in enumerate(itertools.islice(zip(rounds(forget), rounds(retain), strict=False), STEPS)):
        optimizer.zero_grad()
        losses = cross_entropy(net(x), y, reduction="none")
        own = (losses.detach() + 1e-6).log().numpy()
        (-(torch.from_numpy(strengths(own, shift)) * losses).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        cross_entropy(net(u), v).backward()
        optimizer.step()
        if (t + 1) % 4 == 0:
            net.eval()
            with torch.no_grad():
                shift = min(max(shift + pull * (look(net) - target), bounds[0]), bounds[2])
            net.train()
            shifts.append(shift)
        yield


def first(net, data, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = (torch.cat(parts)[:count] for parts in zip(*data, strict=True))
    return net(x), y


def to_unseen(net, forget, retain):
    def logs(data, count: int) -> numpy.ndarray:
        with torch.no_grad():
            return numpy.sort((cross_entropy(*first(net, data, count), reduction="none") + 1e-6).log().numpy())

    def look(net) -> float:
        at = (numpy.arange(200) + 0.5) / 200
        return float((numpy.quantile(logs(UNSEEN, 16), at) - numpy.quantile(logs(forget, 16), at)).mean())

    def strengths(own, shift):
        places = (own.argsort().argsort() + 0.5) / len(own)
        return 0.1 * (numpy.quantile(targets, places) + shift - own) / numpy.exp(own)

    net.eval()
    targets = logs(UNSEEN, 16)
    net.train()
    optimizer, shifts = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), SHIFTS.setdefault("unseen", [])
    yield from steps_of(net, forget, retain, optimizer, strengths, shifts, look, 0.0, (0.0, 2.0, 4.0), 1.0)


def to_accuracy(net, forget, retain):
    def look(net) -> float:
        logits, y = first(net, forget, 16)
        return float((logits.argmax(1) == y).double().mean())

    def strengths(own, shift):
        wrong = own.argsort().argsort() + 0.5 >= 0.3 * len(own)
        return 0.1 * wrong * numpy.maximum(0.0, math.log(math.log(4)) + shift - own) / numpy.exp(own)

    optimizer, shifts = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), SHIFTS.setdefault("accuracy", [])
    yield from steps_of(net, forget, retain, optimizer, strengths, shifts, look, 0.3, (0.0, 2.0, 5.0), 3.0)


@pytest.mark.parametrize(("name", "more"), [("unseen", ""), ("accuracy", ",target_accuracy=0.3")])
def test_updates_are_the_transcriptions(name, more, monkeypatch) -> None:
    # Forgetting that is met ends the run, and this is about every step.
    for kind in (UnseenLosses, TargetAccuracy):
        compare = kind._compare
        monkeypatch.setattr(kind, "_compare", lambda *a, compare=compare: (*compare(*a)[:2], False, compare(*a)[3]))
    SHIFTS.clear()
    transcription = {"unseen": to_unseen, "accuracy": to_accuracy}[name]
    found = distance(f"sfron:{SETTINGS},calibration_samples=16{more}", transcription, *two_sets(), unseen=UNSEEN)
    assert found <= CLOSE
    assert len(set(SHIFTS[name])) > 2, "looks must have moved the shift for this to mean anything"


# --- Runs -----------------------------------------------------------------------------------------------------


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


class Scripted(UnseenLosses):
    """Looks with the scores of a script."""

    scores: tuple[float, ...] = ()
    met_at: int | None = None

    def look(self, iteration, forget, unseen):
        entry = super().look(iteration, forget, unseen)
        entry.update(score=self.scores[len(self.path) - 1], met=len(self.path) == self.met_at)
        return entry


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


def test_a_class_is_forgotten_to_an_accuracy(digits) -> None:  # noqa: F811
    """A digit: of its samples a given part is still got right, and the others are kept."""
    forget = digits.labels == 3
    others = digits.test_labels[:500] != 3
    unseen = ShuffledBatches(digits.test_images[:500][others], digits.test_labels[:500][others], 64, 3)
    for target in (0.0, 0.4):
        model = copy.deepcopy(digits.model)
        method = SFRon(
            forget_alpha="auto", target_accuracy=target, rule="momentum", momentum=0.9, lr=0.05, lr_schedule="cosine",
            iterations=40,
        )  # fmt: skip
        result = Unlearner(model, Classification(), method).run(
            digits.batches(forget), digits.batches(~forget, 29), unseen=unseen
        )
        left, kept = digits.on(model, forget)[0], digits.on(model, ~forget)[0]
        end = next(e for e in result.calibration["path"] if e["iteration"] == result.calibration["ended_at"])
        print(f"target {target}: {left:.3f} left, retained {kept:.3f}, unseen {end['unseen_accuracy']:.3f}")
        print([(e["iteration"], round(e["shift"], 2), round(e["accuracy"], 3)) for e in result.calibration["path"]])
        assert abs(left - target) <= (0.02 if target == 0.0 else 0.15)
        assert kept > 0.97 and end["unseen_accuracy"] > result.calibration["path"][0]["unseen_accuracy"] - 0.08


def test_forgotten_digits_come_to_look_like_unseen_ones(digits) -> None:  # noqa: F811
    """A random fifth: accuracy and losses approach those of unseen digits, and the rest is kept."""
    forget = torch.zeros_like(digits.labels, dtype=torch.bool)
    forget[torch.randperm(len(forget), generator=torch.Generator().manual_seed(0))[: len(forget) // 5]] = True
    unseen = ShuffledBatches(digits.test_images[:500], digits.test_labels[:500], 64, 3)
    model = copy.deepcopy(digits.model)
    method = SFRon(forget_alpha="auto", rule="momentum", momentum=0.9, lr=0.02, lr_schedule="cosine", iterations=40)
    result = Unlearner(model, Classification(), method).run(
        digits.batches(forget), digits.batches(~forget, 29), unseen=unseen
    )

    def apart(model: nn.Module) -> float:
        own = []
        for images, labels in (
            (digits.images[forget], digits.labels[forget]),
            (digits.test_images[500:], digits.test_labels[500:]),
        ):
            with torch.no_grad():
                own.append(nn.functional.cross_entropy(model(images), labels, reduction="none").numpy())
        return ks_2samp(*own).statistic

    before, after = apart(digits.model), apart(model)
    kept = digits.on(model, ~forget)[0]
    lost = digits.on_test(digits.model) - digits.on_test(model)
    print(f"distance to other unseen digits {before:.3f} -> {after:.3f}, retained {kept:.3f}, test lost {lost:.3f}")
    print([(e["iteration"], round(e["shift"], 2), round(e["distance"], 3)) for e in result.calibration["path"]])
    assert after < 0.6 * before
    assert kept > 0.98 and lost < 0.05


class Diffusion(Task):
    """A task without labels."""

    def prepare(self, batch, device):
        return batch

    def losses(self, model, batch):
        raise NotImplementedError

    def inputs(self, batch):
        return batch


# --- What is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_method", "words"),
    [
        (lambda: RandomLabel(forget_alpha="auto"), "random_label descends towards a replacement: give a number"),
        (lambda: SFRon(forget_alpha="auto", forget_term="replace"), "sfron descends towards a replacement"),
        (lambda: SFRon(forget_alpha="strong"), "^forget_alpha: expected a number or 'auto', got 'strong'"),
        (lambda: SFRon(forget_alpha="auto", calibrate_every=0), "^calibrate_every"),
        (lambda: SFRon(forget_alpha="auto", target_accuracy=1.5), "^target_accuracy: expected a number from 0 to 1"),
        (lambda: SFRon(forget_alpha=2.0, target_accuracy=0.0), "^target_accuracy is what forget_alpha='auto' steers"),
        (lambda: SFRon(forget_alpha="auto", calibration_samples=15), "^calibration_samples: expected 16 or more"),
    ],
)
def test_settings_that_cannot_be(make_method, words) -> None:
    with pytest.raises(InputError, match=words):
        make_method()


def test_runs_that_cannot_be(tmp_path) -> None:
    data = sets()
    with pytest.raises(InputError, match=r"^sfron takes an unseen set"):
        run(SFRon(**SHORT), {**data, "unseen": None})
    with pytest.raises(InputError, match=r"makes no checkpoints"):
        run(SFRon(**SHORT), output_dir=tmp_path, checkpointing_steps=2)
    with pytest.raises(InputError, match="has 12 unseen samples to learn from: pass 16 or more"):
        run(SFRon(**SHORT), {**data, "unseen": data["unseen"][:2]})
    with pytest.raises(InputError, match="does not add up over batches"):
        Unlearner(make(), Classification(), SFRon(**SHORT), gradient_accumulation_steps=2)
    own = Classification(lambda logits, labels: nn.functional.cross_entropy(logits, labels, reduction="none"))
    with pytest.raises(InputError, match=r"^target_accuracy goes with the cross-entropy: leave"):
        Unlearner(make(), own, SFRon(**SHORT, target_accuracy=0.0))
    with pytest.raises(InputError, match=r"^Diffusion has no accuracy .*: leave target_accuracy out"):
        Unlearner(make(), Diffusion(), SFRon(**SHORT, target_accuracy=0.0))
    images, labels = data["unseen"][0]
    data["unseen"] = [(images * float("nan"), labels), *data["unseen"][1:]]
    with pytest.raises(NonFiniteError, match="a loss on unseen data is not finite"):
        run(SFRon(**SHORT), data)
