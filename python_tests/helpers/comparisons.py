"""Small comparisons, as several test files make them."""

from __future__ import annotations

from unlearn_ext.comparison.protocol import Protocol
from unlearn_ext.comparison.runners import Runner

SIZES = {"train_size": 100, "held_out_size": 50, "test_size": 100, "epochs": 2, "batch_size": 32}
TINY = Protocol(**SIZES)


def changed(**sizes) -> Protocol:
    return Protocol(**{**SIZES, **sizes})


class Scripted(Runner):
    """Runs a function of the model and the data in a method's place."""

    def __init__(self, label, does=lambda **given: {}, needs_held_out=False, **settings):
        self.label, self.does, self.given, self.needs = label, does, settings, needs_held_out
        self.calls = 0

    @property
    def needs_held_out(self):
        return self.needs

    def settings(self):
        return {"method": self.label, **self.given}

    def __call__(self, model, forget, retain, held_out, seed):
        self.calls += 1
        return self.does(model=model, forget=forget, retain=retain, held_out=held_out, seed=seed) or {}
