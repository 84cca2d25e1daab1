"""A comparison's statistics, the rule of its warnings, and its table."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from unlearn_ext.comparison.run import document
from unlearn_ext.comparison.summary import deviations, noise_floor, ranks, spread
from unlearn_ext.comparison.table import show


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


# --- The table ----------------------------------------------------------------------------------------------


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
