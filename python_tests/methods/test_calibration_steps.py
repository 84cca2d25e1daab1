"""20 steps of calibrated forgetting against plain PyTorch."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch
from helpers.models import batches
from helpers.transcriptions import CLOSE, STEPS, distance, rounds
from helpers.transcriptions import sets as two_sets
from torch.nn.functional import cross_entropy

from unlearn_ext.methods.calibration import TargetAccuracy, UnseenLosses

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
