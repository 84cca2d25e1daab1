"""A run's memory is given back when it ends, not when Python next collects circles."""

from __future__ import annotations

import gc
import weakref

import pytest
from helpers.models import batches, make

from unlearn_ext import Unlearner
from unlearn_ext.run import loop
from unlearn_ext.tasks import Classification


@pytest.mark.parametrize(
    "method", ["sfron:iterations=2,gamma=none,rule=adam", "sfron:iterations=2,gamma=none,forget_alpha=auto,rule=adam"]
)
def test_moments_and_gradients_end_with_the_run(method: str, monkeypatch) -> None:
    optimizers: list[weakref.ref] = []
    start = loop.Loop.start

    def noted(self, checkpoint):
        optimizers.append(weakref.ref(self.optimizer))
        return start(self, checkpoint)

    monkeypatch.setattr(loop.Loop, "start", noted)
    sets = {"forget": batches(2, 6, seed=1), "retain": batches(2, 6, seed=2)}
    if "auto" in method:
        sets["unseen"] = batches(3, 6, seed=3)
    Unlearner(make(), Classification(), method).run(
        **sets
    )  # the first optimizer of a process imports what keeps frames
    optimizers.clear()
    gc.collect()
    gc.disable()
    try:
        result = Unlearner(make(), Classification(), method).run(**sets)
        alive = [optimizer() for optimizer in optimizers]
        assert alive == [None]
    finally:
        gc.enable()
    assert result.counts["iterations"] == 2
