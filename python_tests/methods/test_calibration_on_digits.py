"""What calibrated forgetting claims, on real digits: samples come to look unseen, a class comes to an accuracy."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.digit_networks import Digits, trained
from scipy.stats import ks_2samp
from torch import nn

from unlearn_ext import Unlearner
from unlearn_ext.data.shuffled import ShuffledBatches
from unlearn_ext.methods import SFRon
from unlearn_ext.tasks import Classification


@pytest.fixture(scope="module")
def digits() -> Digits:
    return trained()


@pytest.mark.slow
def test_a_class_is_forgotten_to_an_accuracy(digits) -> None:
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


@pytest.mark.slow
def test_forgotten_digits_come_to_look_like_unseen_ones(digits) -> None:
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
