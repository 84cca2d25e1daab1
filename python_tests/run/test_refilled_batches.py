"""Loaders that give the same tensors again and again, filled anew: what a run holds on to are copies."""

from __future__ import annotations

import collections
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers import calibrated, runs
from helpers.models import batches, make
from torch import Tensor

from unlearn_ext.distributed.batches import cloned
from unlearn_ext.evaluation import predict
from unlearn_ext.methods import SFRon


class Refilling:
    """Batches of one size, all in the same tensors."""

    def __init__(self, data: list, buffer: tuple | None = None):
        self.data, self.buffer = data, buffer

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self):
        buffer = self.buffer or tuple(torch.empty_like(part) for part in self.data[0])
        for batch in self.data:
            for place, part in zip(buffer, batch, strict=True):
                place.copy_(part)
            yield buffer


def refilling(data: dict) -> dict:
    return {name: Refilling(part) for name, part in data.items()}


def test_looks_of_a_calibration() -> None:
    data = calibrated.sets()
    _, expected = calibrated.run(SFRon(**calibrated.SHORT, gamma=None), data)
    _, found = calibrated.run(SFRon(**calibrated.SHORT, gamma=None), refilling(data))
    assert found.calibration == expected.calibration and found.history == expected.history


def test_the_look_at_the_last_forget_batch() -> None:
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}

    changes = {"iterations": 7, "forget_freq": 2}
    expected = runs.run(make(), data, changes).forget_eval
    buffer = tuple(torch.empty_like(part) for part in data["forget"][0])  # of both: a retain batch comes last
    shared = {name: Refilling(part, buffer) for name, part in data.items()}
    assert runs.run(make(), shared, changes).forget_eval == expected and expected


def test_predictions() -> None:
    data = batches(3, 6, seed=1)
    model = make()
    for found, expected in zip(predict(model, Refilling(data)), predict(model, data), strict=True):
        assert torch.equal(found, expected)
    logits = [(torch.randn(6, 4, generator=torch.Generator().manual_seed(i)), y) for i, (_, y) in enumerate(data)]
    model = torch.nn.Identity()
    for found, expected in zip(predict(model, Refilling(logits)), predict(model, logits), strict=True):
        assert torch.equal(found, expected)


Pair = collections.namedtuple("Pair", "x y")


@dataclass
class Own:
    x: Tensor
    more: dict


def test_copies_are_of_the_same_types() -> None:
    x, y, n = torch.zeros(3), torch.ones(2), np.zeros(2)
    batch = [Pair(x, y), collections.UserDict(x=x, n=n), collections.OrderedDict(x=(x,)), Own(x, {"y": [y]}), "text", 3]
    batch.append(generator := (i for i in range(3)))  # which cannot be copied
    found = cloned(batch)
    x.fill_(5.0), y.fill_(5.0), n.fill(5.0)
    pair, user, ordered, own, *rest = found
    assert [type(part) for part in found] == [type(part) for part in batch] and rest == ["text", 3, generator]
    zeros = [pair.x, user["x"], ordered["x"][0], own.x, torch.from_numpy(user["n"])]
    assert not any(part.any() for part in zeros) and torch.equal(pair.y, torch.ones(2)) and own.more["y"][0].sum() == 2


@pytest.mark.parametrize(
    ("iterations", "stops", "samples"), [(1, None, 6), (3, None, 5), (6, None, 4), (6, 2, 6), (6, 4, 5)]
)
def test_the_batch_that_is_kept_is_that_of_the_last_forget_step(
    iterations: int, stops: int | None, samples: int
) -> None:
    """Every second iteration forgets; an evaluation may stop the run before its end."""
    forget = [(x[:size], y[:size]) for (x, y), size in zip(batches(3, 6, seed=1), (6, 5, 4), strict=True)]
    data = {"forget": forget, "retain": batches(5, 6, seed=2)}
    asked = {"evaluate": lambda model, done: done == stops, "evaluate_every": 2}
    result = runs.run(make(), data, {"iterations": iterations, "forget_freq": 2}, **asked)
    assert result.forget_eval["samples"] == samples
