"""Small comparisons, as several test files make them."""

from __future__ import annotations

from unlearn_ext.comparison.runners import Runner
from unlearn_ext.comparison.workload import Workload
from unlearn_ext.demo.digits_comparison import DigitsProtocol, digits_workload

from . import shared_digits

SIZES = {"train_size": 100, "held_out_size": 50, "test_size": 100, "epochs": 2, "batch_size": 32}
TINY = DigitsProtocol(**SIZES)


def changed(**sizes) -> DigitsProtocol:
    return DigitsProtocol(**{**SIZES, **sizes})


def workload(protocol: DigitsProtocol = TINY) -> Workload:
    return digits_workload(shared_digits.digits(), protocol)


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
