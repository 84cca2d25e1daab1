"""Settings and evaluations as JSON has them."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections import Counter, OrderedDict
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import batches, make
from helpers.runs import method

from unlearn_ext import InputError, Unlearner
from unlearn_ext.methods import SSD, BadTeacher, Finetune, RandomLabel, SFRon
from unlearn_ext.tasks import Classification
from unlearn_ext.utils.plain import plain

DATA = {"forget": batches(2, 6, seed=1), "retain": batches(2, 6, seed=2)}


@pytest.mark.parametrize(
    "kind, name, value, expected",
    [
        (Finetune, "lr", np.float32(0.25), 0.25),
        (Finetune, "lr", np.float64(0.25), 0.25),
        (Finetune, "lr", torch.tensor(0.25, requires_grad=True), 0.25),
        (Finetune, "lr", np.array(0.25), 0.25),
        (Finetune, "lr", Fraction(1, 4), 0.25),
        (Finetune, "iterations", np.int64(3), 3),
        (Finetune, "epochs", np.int32(3), 3),
        (Finetune, "betas", (np.float32(0.5), torch.tensor(0.75)), (0.5, 0.75)),
        (Finetune, "freeze_batch_norm", np.bool_(True), True),
        (Finetune, "lr_schedule", np.str_("cosine"), "cosine"),
        (Finetune, "param_groups", {"*": {"lr": np.float32(0.5)}}, {"*": {"lr": 0.5}}),
        (SFRon, "gamma", np.float32(2.0), 2.0),
        (SFRon, "fisher_batches", (np.int64(1), np.int64(2)), (1, 2)),
        (RandomLabel, "forget_freq", np.int64(2), 2),
        (BadTeacher, "forget_alpha", np.float32(0.5), 0.5),
        (BadTeacher, "seed", np.int64(5), 5),
        (SSD, "alpha", np.float32(2.0), 2.0),
        (SSD, "chunk", np.int64(2), 2),
    ],
)
def test_settings_are_pythons_numbers(kind, name, value, expected) -> None:
    made = getattr(kind(**{name: value}), name)
    assert made == expected and type(made) is type(expected)
    assert json.loads(json.dumps(made)) == json.loads(json.dumps(expected))
    if type(made) is tuple:
        assert list(map(type, made)) == list(map(type, expected))


def test_settings_that_are_set_later() -> None:
    settings = method()
    settings.lr = np.float32(0.25)
    assert type(settings.lr) is float


def test_a_checkpoint_of_such_settings(tmp_path) -> None:
    settings = method(lr=np.float32(0.02), iterations=np.int64(4), max_norm=torch.tensor(1.0))
    unlearner = Unlearner(
        make(), Classification(), settings, ema_decay=np.float32(0.5), gradient_accumulation_steps=np.int64(1)
    )
    unlearner.run(**DATA, output_dir=tmp_path, checkpointing_steps=2)
    saved = json.loads((tmp_path / "checkpoint-2" / "state.json").read_text())["settings"]
    assert (saved["lr"], saved["iterations"], saved["ema_decay"]) == (float(np.float32(0.02)), 4, 0.5)


@dataclasses.dataclass(kw_only=True)
class Odd(Finetune):
    chosen: object = None


def test_what_no_checkpoint_can_hold_is_refused_before_training(tmp_path) -> None:
    model = make()
    before = model.conv.weight.detach().clone()
    unlearner = Unlearner(model, Classification(), Odd(chosen={1, 2}, iterations=2))
    with pytest.raises(InputError, match=r"chosen: a checkpoint cannot hold .*, of type set: give a number"):
        unlearner.run(retain=DATA["retain"], output_dir=tmp_path / "out", checkpointing_steps=1)
    assert torch.equal(before, model.conv.weight) and not (tmp_path / "out").exists()
    unlearner.run(retain=DATA["retain"])  # without checkpoints it may


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Scores:
    accuracy: np.float32
    by_class: dict


class Odds:
    def __str__(self) -> str:
        return "odds"


CYCLE: dict = {}
CYCLE["self"] = CYCLE


@pytest.mark.parametrize(
    "value, expected",
    [
        ({np.int64(3): np.float32(0.5)}, {"3": 0.5}),
        ({torch.tensor(3): 1}, {"3": 1}),
        ({(np.int64(1), "a"): 1}, {"(1, 'a')": 1}),
        ({None: 1, True: 2, 1.5: 3, 7: 4, Colour.RED: 5}, {"null": 1, "true": 2, "1.5": 3, "7": 4, "red": 5}),
        ({np.float32(0.5): 1, np.bool_(False): 2, np.str_("x"): 3}, {"0.5": 1, "false": 2, "x": 3}),
        (Scores(np.float32(0.5), {np.int64(0): np.nan}), {"accuracy": 0.5, "by_class": {"0": None}}),
        ([np.arange(2), torch.tensor([0.5, math.inf])], [[0, 1], [0.5, None]]),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        (OrderedDict(a=Counter("aab")), {"a": {"a": 2, "b": 1}}),
        ({"s": {3, 1, 2}, "t": (1, 2), "f": frozenset([np.int64(4)])}, {"s": [1, 2, 3], "t": [1, 2], "f": [4]}),
        ([Path("x"), Decimal("1.5"), Fraction(1, 2), 1 + 2j, b"x"], ["x", "1.5", 0.5, "(1+2j)", "b'x'"]),
        ([-math.inf, np.float64("nan"), np.float16(1.0), 10**30], [None, None, 1.0, 10**30]),
        ({1: "a", "1": "b", 2: "c"}, {"1": "a", "1 (str)": "b", "2": "c"}),
        ({"1": "a", 1: "b", "1 (int)": "c"}, {"1": "a", "1 (int)": "b", "1 (int) (str)": "c"}),
        ({"true": {1: 1, "1": 2}, True: 3}, {"true": {"1": 1, "1 (str)": 2}, "true (bool)": 3}),
        (Odds(), "odds"),
        (torch.empty(2, device="meta"), None),
    ],
)
def test_what_an_evaluation_returns(value, expected) -> None:
    found = plain(value)
    json.dumps(found, allow_nan=False)
    assert found == expected or (expected is None and "meta" in found)


def test_a_value_that_holds_itself() -> None:
    json.dumps(plain(CYCLE), allow_nan=False)


def test_it_stands_in_the_history(tmp_path) -> None:
    result = Unlearner(make(), Classification(), method(iterations=2)).run(
        **DATA,
        evaluate=lambda model, step: Scores(np.float32(0.5), {np.int64(1): torch.tensor(2)}),
        evaluate_every=1,
        output_dir=tmp_path,
    )
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert result.history[1]["evaluation"] == {"accuracy": 0.5, "by_class": {"1": 2}}


@pytest.mark.parametrize("verdict", [True, np.True_, np.array(True), torch.tensor(True)])
def test_a_scalar_that_stops(verdict) -> None:
    result = Unlearner(make(), Classification(), method(iterations=3)).run(
        **DATA, evaluate=lambda model, step: verdict, evaluate_every=1
    )
    assert result.stopped_at == 1 and "evaluation" not in result.history[0]
