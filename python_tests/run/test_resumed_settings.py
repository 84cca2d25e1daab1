"""Functions and objects among a task's settings: another one is refused, the same one made again is not."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict

import pytest
import torch
from helpers.models import batches, make
from helpers.runs import method
from torch import Tensor, nn
from torch.nn import functional as F

from unlearn_ext import InputError, Unlearner
from unlearn_ext.run.settings import in_words
from unlearn_ext.tasks import Classification


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def powered(logits: Tensor, labels: Tensor, power: float = 2.0) -> Tensor:
    return losses(logits, labels) ** power


def enclosing(power: float):
    log: list[float] = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        log.append(1.0)
        return losses(logits, labels) ** power

    return loss


class Annealed(nn.CrossEntropyLoss):
    """Weaker with each call."""

    def __init__(self, rate: float, **arguments):
        super().__init__(**arguments, reduction="none")
        self.rate, self.calls = rate, 0

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(logits, labels) / (1 + self.rate * self.calls)


class Slotted:
    __slots__ = ("rate",)

    def __init__(self, rate: float):
        self.rate = rate

    def half(self, logits: Tensor, labels: Tensor) -> Tensor:
        return losses(logits, labels) / 2


class Sizes(list):
    pass


LOSSES = {
    "none": lambda: None,
    "a function": lambda: losses,
    "a default": lambda: powered,
    "a partial": lambda: functools.partial(powered, power=3.0),
    "a partial, other": lambda: functools.partial(powered, power=4.0),
    "a closure": lambda: enclosing(2.0),
    "a closure, other": lambda: enclosing(3.0),
    "a lambda": lambda: lambda logits, labels: 2 * losses(logits, labels),
    "a lambda, other": lambda: lambda logits, labels: 3 * losses(logits, labels),
    "a module": lambda: Annealed(0.1),
    "a module, other": lambda: Annealed(0.2),
    "a module, weights": lambda: Annealed(0.1, weight=torch.ones(4)),
    "a module, other weights": lambda: Annealed(0.1, weight=torch.arange(4.0)),
    "a method": lambda: Slotted(0.1).half,
    "a method, other": lambda: Slotted(0.2).half,
    "a set": lambda: functools.partial(losses, classes={"b", "a", "c"}),
    "a set, other": lambda: functools.partial(losses, classes={"b", "a"}),
    "an ordered dictionary": lambda: functools.partial(losses, weights=OrderedDict(a=1.0)),
    "an ordered dictionary, other": lambda: functools.partial(losses, weights=OrderedDict(a=2.0)),
    "a list of a class": lambda: functools.partial(losses, weights=Sizes([1, 2])),
    "a list of a class, other": lambda: functools.partial(losses, weights=Sizes([1, 3])),
}


def trained(loss, **arguments) -> dict[str, Tensor]:
    model = make()
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    Unlearner(model, Classification(loss), method(iterations=4)).run(**data, **arguments)
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_each_has_words_of_its_own() -> None:
    words = {name: in_words(make_it()) for name, make_it in LOSSES.items()}
    assert len(set(words.values())) == len(words)
    assert words == {name: in_words(make_it()) for name, make_it in LOSSES.items()}
    assert not any(" at 0x" in text for text in words.values())


@pytest.mark.parametrize("name", ["a function", "a closure", "a lambda", "a module, weights"])
def test_a_run_goes_on_with_its_own_loss_and_no_other(name: str, tmp_path) -> None:
    """The annealed one goes on from the call at which the checkpoint was made, whatever was called before."""
    whole = trained(LOSSES[name](), output_dir=tmp_path, checkpointing_steps=2)
    resume = {"output_dir": tmp_path, "resume_from_checkpoint": tmp_path / "checkpoint-2"}
    used = LOSSES[name]()
    trained(used)
    for loss in (LOSSES[name](), used):
        found = trained(loss, **resume)
        assert all(torch.equal(whole[key], found[key]) for key in whole)
    for other in ("none", "a partial", "a closure, other", "a lambda, other", "a module"):
        with pytest.raises(InputError, match=r"was written with task\.loss=.* and this run has .*: resume with the"):
            trained(LOSSES[other](), **resume)


def test_a_script_and_a_module_of_its_name_are_one(monkeypatch) -> None:
    main = types.ModuleType("__main__")
    main.__file__, main.__spec__ = "/somewhere/train.py", None
    monkeypatch.setitem(__import__("sys").modules, "__main__", main)

    def named(module: str):
        function = types.FunctionType(losses.__code__, {"__name__": module})
        function.__qualname__ = "loss"
        return function

    assert in_words(named("__main__")) == in_words(named("train")) == "train.loss" != in_words(named("other"))


def test_what_functions_are_wrapped_in_does_not_count() -> None:
    assert in_words(torch.no_grad()(losses)) == in_words(losses)
    assert in_words(torch.compile(Annealed(0.1))) == in_words(Annealed(0.1))


def test_large_and_deep_values_stay_short() -> None:
    task = Classification(functools.partial(losses, labels=list(range(10_000))))
    other = Classification(functools.partial(losses, labels=list(range(10_001))))
    first, second = (Unlearner(make(), each, method()).context.settings()["task.loss"] for each in (task, other))
    assert first != second and max(len(first), len(second)) < 300
    loop: list = []
    loop.append(loop)
    assert in_words(loop)
