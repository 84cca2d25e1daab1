"""Calibrated forgetting: strengths and looks against plain formulas, and the spacing of looks."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from helpers.calibrated import SHORT
from scipy.stats import ks_2samp

from unlearn_ext.methods import SFRon
from unlearn_ext.methods.calibration import TargetAccuracy, UnseenLosses, spacing


def losses(count: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4


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
