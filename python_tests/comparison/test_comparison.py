"""A comparison: one run of a seed, what of it is timed, kept and found again, and the whole."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from helpers.comparisons import Scripted, changed, workload

from unlearn_ext.comparison import keys, one_seed
from unlearn_ext.comparison.choosing import choose
from unlearn_ext.comparison.one_seed import OneSeed
from unlearn_ext.comparison.records import Records
from unlearn_ext.comparison.run import Comparison
from unlearn_ext.distributed.hashing import sample_hashes, weights_hash
from unlearn_ext.errors import NonFiniteError

pytest.importorskip("mlxtend")


# --- One run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def seed_zero(tmp_path, models_dir) -> OneSeed:
    return OneSeed(workload(), 0, models_dir, Records(tmp_path))


@pytest.mark.slow
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
    metrics, retraining = record["metrics"], seed_zero.models["retrained"].seconds
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


def test_every_method_starts_from_the_same_weights_and_sees_what_it_should(seed_zero) -> None:
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
    assert seen[0] == seen[1] and seen[0][0] == weights_hash(seed_zero.models["original"].model.state_dict().items())
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


def test_settings_that_do_not_suit_a_seed_are_a_result(seed_zero) -> None:
    (runner,) = choose(["sfron:iterations=1,gamma=1e30"], "published", "random")
    record, _ = seed_zero.run(runner)
    assert "the mask keeps no weight" in record["failed"]


def test_a_result_is_found_again_unless_something_differs(tmp_path, models_dir) -> None:
    runner = Scripted("one", strength=1)
    assert [OneSeed(workload(), 0, models_dir, Records(tmp_path)).run(runner)[1] for _ in range(2)] == [False, True]
    assert runner.calls == 1
    for other, work, seed in (
        (Scripted("one", strength=2), workload(), 0),
        (Scripted("one", strength=1), workload(changed(held_out_size=60)), 0),
        (Scripted("one", strength=1), workload(), 1),
    ):
        assert not OneSeed(work, seed, models_dir, Records(tmp_path)).run(other)[1]
        assert other.calls == 1


def test_a_fresh_comparison_trains_and_runs_again_and_what_it_writes_is_found(tmp_path) -> None:
    runner = Scripted("one", lambda **given: {"done": 1})

    def compare(fresh: bool) -> tuple[dict, bool]:
        again = []
        Comparison(
            workload(changed(epochs=1)),
            [runner],
            count=1,
            output_dir=tmp_path / "out",
            models_dir=tmp_path / "models",
            fresh=fresh,
            finished=lambda seed, label, record, found: again.append(found),
        ).run()
        times = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
        return times, again == [True]

    first, *later = [compare(fresh) for fresh in (False, False, True, False)]
    assert [found for _, found in (first, *later)] == [False, True, False, True] and runner.calls == 2
    assert len(first[0]) == 5 and first[0] == later[0][0] and later[1][0] == later[2][0]
    assert all(later[1][0][name] > written for name, written in first[0].items())


def test_a_result_of_another_version_or_backend_is_not_used_again(tmp_path, models_dir, monkeypatch) -> None:
    runner = Scripted("one")

    def found() -> bool:
        return OneSeed(workload(), 0, models_dir, Records(tmp_path)).run(runner)[1]

    assert [found(), found()] == [False, True]
    for changes in ((keys, "__version__", "9.9"), (one_seed.ops, "backend", lambda device: "another")):
        with monkeypatch.context() as patch:
            patch.setattr(*changes)
            assert [found(), found()] == [False, True]
    assert found() and runner.calls == 3


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


# --- The whole ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory, models_dir) -> dict:
    directory = tmp_path_factory.mktemp("small")
    runners = [*choose(["sfron:iterations=4"], "published", "random"), Scripted("noop", lambda **given: {"done": 1})]
    comparison = Comparison(workload(), runners, seed=0, count=2, output_dir=directory, models_dir=models_dir)
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


@pytest.mark.slow
def test_every_method_runs(tmp_path, models_dir) -> None:
    """One iteration or epoch of each: they get what they need, and the gap is one that a few steps can have."""
    short = {name: f"{name}:iterations=1" for name in (runner.label for runner in choose(["all"], "tuned", "random"))}
    short |= {"scrub": "scrub:epochs=1,msteps=1", "ssd": "ssd:alpha=1.5,lambd=0.5"}
    comparison = Comparison(
        workload(),
        choose(list(short.values()), "published", "random"),
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
