"""What a comparison trains and keeps: the models that others are compared with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.comparisons import TINY, changed, workload

from unlearn_ext.comparison import keys
from unlearn_ext.comparison.references import ROLES, References
from unlearn_ext.demo.network import SmallResNet
from unlearn_ext.distributed.hashing import weights_hash
from unlearn_ext.utils.device import device_name

pytest.importorskip("mlxtend")


def key(role="retrained", seed=0, protocol=TINY, **further) -> str:
    work = replace(workload(protocol), **further)
    return References(Path(), work, work.split(seed), seed).key(role)


@pytest.mark.parametrize(
    "change",
    [
        {"role": "original"},
        {"role": "retrained_again"},
        {"seed": 1},
        {"data_hash": "other data"},
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
def test_the_key_changes_with_each_ingredient(change) -> None:
    assert key() == key()
    assert key(**change) != key()
    assert key(**change) != key(protocol=changed(scenario="class", forget_class=5))


def test_the_key_changes_with_threads_and_versions(monkeypatch) -> None:
    found = {key()}
    for changes in (
        (torch, "get_num_threads", lambda: 77),
        (torch, "__version__", "9.9"),
        (keys, "__version__", "9.9"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(*changes)
            found.add(key())
    assert len(found) == 4 and key() in found


def test_seconds_of_another_processor_serve_no_other(monkeypatch) -> None:
    """A share divides by the seconds of a kept model, so that a model's key has what it was trained on."""
    found = set()
    for device, gpu in (("cpu", None), ("cuda", "A100"), ("cuda", "H100")):
        for processor in ("one", "another"):
            monkeypatch.setattr(keys, "device_name", {"cpu": processor, "cuda": gpu}.__getitem__)
            found.add(key(protocol=changed(device=device)))
            assert keys.machine(device)["processor"] == processor and keys.machine(device).get("gpu") == gpu
    assert len(found) == 6
    monkeypatch.undo()
    assert keys.machine("cpu")["processor"] == device_name()


def test_models_are_trained_once_and_kept(tmp_path) -> None:
    work = workload()
    split = work.split(0)
    first = References(tmp_path, work, split, 0)
    hashes = {role: weights_hash(first[role].model.state_dict().items()) for role in ROLES}
    assert len(set(hashes.values())) == 3 and first["original"].seconds.clock > 0
    assert len(list(tmp_path.iterdir())) == 3
    told: list[str] = []
    untrained = replace(work, train=lambda *a: pytest.fail("trained again"))
    second = References(tmp_path, untrained, split, 0, tell=told.append)
    for role in ROLES:
        assert weights_hash(second[role].model.state_dict().items()) == hashes[role]
        assert second[role].seconds == first[role].seconds and not second[role].model.training
    assert not told


@pytest.mark.parametrize("damage", ["cut", "empty", "a bit", "another file"])
def test_a_damaged_model_is_noticed_and_trained_again(damage, tmp_path) -> None:
    work = workload()
    split = work.split(0)
    good = References(tmp_path, work, split, 0)["retrained"].model.state_dict()
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "a bit":
        data[-100] ^= 1
    path.write_bytes({"cut": data[:5000], "empty": b"", "another file": b"x" * 5000}.get(damage, data))
    told: list[str] = []
    again = References(tmp_path, work, split, 0, tell=told.append)["retrained"].model.state_dict()
    assert told == [f"{path.name} is damaged: trained again"]
    assert all(torch.equal(again[name], good[name]) for name in good)
    assert References(tmp_path, work, split, 0, tell=told.append)["retrained"] and len(told) == 1
