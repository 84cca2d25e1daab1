"""What the methods claim, on real digits: a class is forgotten, and the rest is kept within a stated bound."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.digit_networks import Digits, measured, trained

from unlearn_ext import Unlearner
from unlearn_ext.data.shuffled import ShuffledBatches
from unlearn_ext.methods import METHODS, parse
from unlearn_ext.tasks import Classification

MOMENTUM = {"rule": "momentum", "momentum": 0.9, "lr": 0.01, "iterations": 30}


@pytest.fixture(scope="module")
def digits() -> Digits:
    return trained()


def forget_three(digits: Digits, name: str, **changes):
    model, three = copy.deepcopy(digits.model), digits.labels == 3
    method = parse(name, **{**MOMENTUM, **changes})
    result = Unlearner(model, Classification(), method).run(digits.batches(three), digits.batches(~three, 29))
    return model, result


# The changed settings, the largest accuracy left on the forgotten digits, and what the retained test digits may lose.
# Bad Teacher's were chosen on networks and splits of seeds 1 to 3, which gave 0.00 to 0.01 and 0.005 to 0.044 (at its
# own rule, 0.00 to 0.54: momentum leaves it half-way); chance is 0.10.
CLASS = {
    "gradient_ascent": ({"iterations": 18}, 0.30, 0.25),
    "negative_gradient_plus": ({"lr": 0.005}, 0.05, 0.10),
    "projected": ({"lr": 0.005}, 0.05, 0.10),
    "random_label": ({}, 0.05, 0.10),
    "salun": ({}, 0.05, 0.10),
    "scrub": ({"epochs": 2, "msteps": 2}, 0.05, 0.10),
    "bad_teacher": ({"rule": "adam", "momentum": 0.0, "lr": 0.02, "iterations": 120}, 0.10, 0.10),
    "sfron": ({"forget_alpha": 1000.0, "adaptive_eps": 1e-2, "max_norm": 2.0, "forget_freq": 5}, 0.05, 0.10),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASS)
def test_a_class_is_forgotten_and_the_others_are_kept(name, digits) -> None:
    changes, left, lost = CLASS[name]
    model, result = forget_three(digits, name, **changes)
    three = digits.labels == 3
    accuracy, loss = digits.on(model, three)
    before, before_loss = digits.on(digits.model, three)
    kept = digits.on_test(digits.model, 3) - digits.on_test(model, 3)
    print(f"{name}: forgotten {before:.3f} -> {accuracy:.3f}, loss {before_loss:.3f} -> {loss:.3f}, lost {kept:.3f}")
    assert before > 0.95 and accuracy <= left and loss > before_loss + 0.5
    assert kept <= lost
    if name == "salun":
        assert result.moved_protected == 0


def test_finetuning_keeps(digits) -> None:
    model, _ = forget_three(digits, "finetune", lr=0.005)
    kept = digits.on_test(digits.model, 3) - digits.on_test(model, 3)
    print(f"finetune: forgotten {digits.on(model, digits.labels == 3)}, lost {kept:.3f}")
    assert kept <= 0.03 and digits.on(model, digits.labels != 3)[0] > 0.97


@pytest.mark.slow
def test_the_forget_loss_rises_to_that_of_unseen_data_and_stops(digits) -> None:
    """A random fifth of the training digits, which shall look like unseen ones."""
    generator = torch.Generator().manual_seed(0)
    forget = torch.zeros_like(digits.labels, dtype=torch.bool)
    forget[torch.randperm(len(forget), generator=generator)[:200]] = True
    unseen = ShuffledBatches(digits.test_images[:500], digits.test_labels[:500], 64, 3)
    model = copy.deepcopy(digits.model)
    method = parse("nabla_tau:lr=1e-3,iterations=60")
    result = Unlearner(model, Classification(), method).run(
        digits.batches(forget), digits.batches(~forget, 29), unseen=unseen
    )
    (_, before), (_, after) = digits.on(digits.model, forget), digits.on(model, forget)
    _, of_unseen = measured(model, digits.test_images[:500], digits.test_labels[:500])
    kept = digits.on_test(digits.model) - digits.on_test(model)
    taus = [round(entry["unseen_loss"], 3) for entry in result.history if "unseen_loss" in entry]
    print(f"nabla_tau: loss {before:.3f} -> {after:.3f}, unseen {of_unseen:.3f}, lost {kept:.3f}, tau {taus}")
    assert len(taus) == 5
    assert abs(after - of_unseen) < abs(before - taus[0]) / 2, "it came nearer to unseen data"
    assert after <= max(taus), "and not past it"
    assert kept <= 0.03


@pytest.mark.slow
def test_a_class_is_learnt_while_another_is_forgotten() -> None:
    digits = trained(9)
    model, forget, learn = copy.deepcopy(digits.model), digits.labels == 3, digits.labels == 9
    changes = {**MOMENTUM, **CLASS["sfron"][0], "iterations": 60}
    Unlearner(model, Classification(), parse("ug_clu", **changes)).run(
        digits.batches(forget), digits.batches(~forget & ~learn, 29), learn=digits.batches(learn, 5)
    )
    kept = digits.on_test(digits.model, 3, 9) - digits.on_test(model, 3, 9)
    nine = digits.test_labels == 9
    learnt, _ = measured(model, digits.test_images[nine], digits.test_labels[nine])
    print(f"ug_clu: forgotten {digits.on(model, forget)[0]:.3f}, learnt {learnt:.3f}, lost {kept:.3f}")
    assert digits.on(digits.model, learn)[0] == 0.0 and learnt > 0.8
    assert digits.on(model, forget)[0] <= 0.05 and kept <= 0.10


def test_every_method_is_here() -> None:
    elsewhere = {"finetune", "nabla_tau", "ug_clu"}  # in tests of their own
    on_classifiers = {name for name, method in METHODS.items() if "classification" in method.row.tasks}
    assert on_classifiers == CLASS.keys() | elsewhere
