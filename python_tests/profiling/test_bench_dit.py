"""The benchmark of diffusion transformers at tiny scale: rows, agreement of its ways, a wrong rival, and its bars."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("diffusers")

from benchmarks.dit import measure as measuring
from benchmarks.dit import network, report, script
from benchmarks.dit.bars import bars, condition
from benchmarks.dit.measure import IMPLEMENTATIONS, STAGES, Measured, Settings, measure
from benchmarks.dit.rivals import Plain, Tuned
from unlearn_ext.profiling.work import MismatchError

TINY = network.Shape(depth=2, width=16, heads=2)
QUICK = Settings(shape=TINY, samples=2, chunk=2, repeats=2, compiler="aot_eager")
FIELDS = {
    "stage", "implementation", "p20_ms", "p50_ms", "p80_ms", "per_second", "speedup_of_ours", "peak_bytes",
    "first_call_s",
}  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # attention has no batching rule
]


# --- Networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout", "tensors", "weights"),
    [
        ("dit-s-2", "diffusers", 234, 39_805_088),
        ("dit-xl-2", "diffusers", 538, 749_826_464),
        ("dit-xl-2", "paper", 403, 674_834_720),
    ],
)
def test_both_layouts_have_the_weights_of_the_real_networks(name, layout, tensors, weights) -> None:
    with torch.device("meta"):
        own = list(network.build(network.NETWORKS[name], layout).parameters())
    assert (len(own), sum(p.numel() for p in own)) == (tensors, weights)


def test_a_gradient_passes_through_every_weight() -> None:
    torch.manual_seed(0)
    model = network.build(TINY, "paper")
    assert all(bool(p.any()) for p in model.parameters())
    task = network.task(model)
    (forget, _), (retain, _) = (network.batches(task, 2, 3, forgotten, torch.device("cpu")) for forgotten in (1, 0))
    assert set(forget["labels"].tolist()) == {207} and 207 not in retain["labels"]
    task.losses(model, forget).mean().backward()
    assert all(bool(p.grad.any()) for p in model.parameters())


# --- Measuring ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> Measured:
    return measure(replace(QUICK, implementations=IMPLEMENTATIONS))


def test_every_stage_has_its_ways(measured: Measured) -> None:
    rows = measured.rows()
    found: dict[str, list[str]] = {stage: [] for stage in STAGES}
    for row in rows:
        assert set(row) == FIELDS and 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["per_second"] == pytest.approx(1e3 / row["p50_ms"])
        assert row["speedup_of_ours"] > 0 and (row["implementation"] != "ours" or row["speedup_of_ours"] == 1)
        compiled = row["implementation"].endswith("compiled")
        assert (row["first_call_s"] is not None) == (compiled and row["stage"] in ("fisher", "iteration"))
        found[row["stage"]].append(row["implementation"])
    steps = [name for name in IMPLEMENTATIONS if name != "ours, per sample"]
    assert IMPLEMENTATIONS[-1] == "passes"
    assert found == {
        "fisher": list(IMPLEMENTATIONS),
        "mask": ["ours", "plain", "tuned"],
        **dict.fromkeys(("forget", "retain", "iteration"), steps),
    }


def test_memory_holds_weights_and_what_a_stage_needs(measured: Measured) -> None:
    """In multiples of the weights' bytes: beside them two diagonals, or a gradient and two moments."""
    weights = 4 * measured.weights
    least = {"fisher": 3, "mask": 3, "forget": 4, "retain": 4}
    assert set(measured.peaks) == {"ours", "ours, in backward", "plain", "tuned"}
    for own in measured.peaks.values():
        assert set(own) == set(least)
        assert all(own[stage] > many * weights for stage, many in least.items())
    assert measured.peaks["ours"]["mask"] < measured.peaks["tuned"]["mask"] < measured.peaks["plain"]["mask"]
    assert measured.peaks["ours"]["forget"] < measured.peaks["plain"]["forget"]
    for stage in ("fisher", "retain"):
        assert measured.peaks["ours, in backward"][stage] < measured.peaks["ours"][stage]


def test_the_document_says_what_was_measured(measured: Measured) -> None:
    document = json.loads(json.dumps(report.document(measured, "dit-s-2")))
    assert document["network"] == {
        "name": "dit-s-2", "layout": "diffusers", "weights": measured.weights, "tensors": 44,
        "depth": 2, "width": 16, "heads": 2,
    }  # fmt: skip
    for key in ("device", "versions", "threads", "dtype", "batch_size", "samples", "chunk", "memory_counted"):
        assert document[key]
    assert document["tuned_adamw"] in ("fused", "foreach") and document["checkpointing"] is False
    assert len(document["rows"]) == len(measured.rows()) and len(document["bars"]) == 6
    assert {bar["holds"] for bar in document["bars"]} <= {True, False}


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "paper", "dtype": "bfloat16", "batch_size": 2},
        {"dtype": "autocast", "checkpointing": True, "stages": ("iteration",)},
    ],
    ids=str,
)
def test_other_settings(options: dict[str, Any]) -> None:
    implementations = ("plain", "tuned", "ours, per sample")
    found = measure(replace(QUICK, repeats=1, implementations=implementations, **options))
    assert set(found.seconds) == set(options.get("stages", STAGES))
    assert all(list(ways) == ["ours", "plain", "tuned"] for ways in found.seconds.values())


@pytest.mark.parametrize(
    ("way", "method", "stage"),
    [
        (Plain, "_add", "fisher"),
        (Tuned, "_add", "fisher"),
        (Plain, "_mask_gradients", "iteration"),
        (Tuned, "_mask_gradients", "iteration"),
    ],
)
def test_a_rival_that_computes_something_else_is_caught(way, method, stage, monkeypatch) -> None:
    settings = replace(QUICK, repeats=1, implementations=("plain", "tuned"), stages=(stage,))
    monkeypatch.setattr(measuring, "peaks", lambda way, batches: {})
    monkeypatch.setattr(way, method, lambda self, *lists: None)
    with pytest.raises(MismatchError, match=f"^{stage}, adamw, .*: {way.__name__.lower()} differs from ours"):
        measure(settings)


def test_a_rivals_mask_is_checked(monkeypatch) -> None:
    settings = replace(QUICK, repeats=1, implementations=("tuned",), stages=("mask",))
    monkeypatch.setattr(measuring, "peaks", lambda way, batches: {})
    mask = Tuned.mask

    def careless(self) -> None:
        self.bench = replace(self.bench, method=replace(self.bench.method, gamma=3.0))
        mask(self)

    monkeypatch.setattr(Tuned, "mask", careless)
    with pytest.raises(MismatchError, match=r"^mask, adamw, .*: tuned differs from ours"):
        measure(settings)


# --- Bars ---------------------------------------------------------------------------------------------------


def made_up(**seconds: dict[str, float]) -> Measured:
    taken = {stage: {name: [value] for name, value in ways.items()} for stage, ways in seconds.items()}
    peaks = {"ours": {"fisher": 5, "forget": 8}, "plain": {"fisher": 10, "forget": 9}}
    return Measured(Settings(), 40, 2, "fused", taken, peaks)


def test_bars_are_held_against_the_faster_rival() -> None:
    found = made_up(
        fisher={"ours": 1.0, "plain": 1.2, "tuned": 1.09, "ours, per sample": 0.9, "ours, compiled": 0.7},
        mask={"ours": 1.0, "plain": 5.0, "tuned": 7.0},
        iteration={
            "ours": 1.1,
            "ours, in backward": 1.0,
            "plain": 1.3,
            "tuned": 1.21,
            "ours, compiled": 0.5,
            "passes": 0.8,
        },
    )
    assert list(map(str, bars(found))) == [
        "holds: whole iteration ≥ 1.2 ×: 1.21 × (ours, in backward against tuned; 1.51 × if only forward and "
        "backward took time)",
        "holds: whole iteration, compiled ≥ 1.2 ×: 2.42 × (ours, compiled against tuned)",
        "missed: Fisher ≥ 1.1 ×: 1.09 × (ours against tuned)",
        "holds: Fisher, batched or compiled ≥ 1.5 ×: 1.56 × (ours, compiled against tuned)",
        "holds: mask ≥ 5 ×: 5.00 × (ours against plain)",
        "holds: peak memory > 1 ×: 1.25 × (ours against plain)",
    ]
    assert condition(found, threads=2) is None
    others = replace(Settings(), shape=TINY, batch_size=4, dtype="autocast", checkpointing=True)
    assert condition(replace(found, settings=others), threads=1) == (
        "The bars are for DiT-S/2 with batches of 1 on two CPU cores; this is 1 thread, another network, batches of 4, "
        "autocast, gradient checkpointing."
    )


def test_what_was_not_measured_is_called_so() -> None:
    found = made_up(fisher={"ours": 1.0}, mask={"ours": 1.0, "tuned": 4.0})
    found.peaks.clear()
    assert list(map(str, bars(found))) == [
        "not measured: whole iteration ≥ 1.2 ×",
        "not measured: whole iteration, compiled ≥ 1.2 ×",
        "not measured: Fisher ≥ 1.1 ×",
        "not measured: Fisher, batched or compiled ≥ 1.5 ×",
        "missed: mask ≥ 5 ×: 4.00 × (ours against tuned)",
        "not measured: peak memory > 1 ×",
    ]


def test_tables_fit_a_terminal(measured: Measured) -> None:
    console = Console(width=80, record=True, file=io.StringIO(), highlight=False)
    report.show(measured, "dit-s-2", console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "diffusers layout",
        "whole iteration",
        "ours, per sample",
        "first call",
        "tuned takes AdamW(",
        "2 blocks",
    ):
        assert words in text


# --- The script ---------------------------------------------------------------------------------------------


def run_script(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_dit.py", *map(str, arguments)])
    return script.main("how fast?")


def test_the_script_writes_rows_and_says_which_bars_hold(tmp_path, monkeypatch, capsys) -> None:
    tiny = ["--depth=1", "--width=16", "--heads=2", "--samples=1", "--repeats=1", "--layout=paper"]
    options = ["--implementations", "plain", "ours_per_sample", "--stages", "fisher", "--json", tmp_path / "x.json"]
    assert run_script(monkeypatch, *tiny, *options) == 0
    shown = capsys.readouterr().out
    assert "paper layout" in shown and "Fisher ≥ 1.1 ×" in shown and "The bars are for DiT-S/2" in shown
    document = json.loads((tmp_path / "x.json").read_text())
    assert [row["implementation"] for row in document["rows"]] == ["ours", "plain", "ours, per sample"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--width=17"], "the width 17 is no multiple of 6 heads: choose another width"),
        (["--device=cuda"], "this torch sees no GPU; use --device cpu"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(arguments, words, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_script(monkeypatch, *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error
