"""benchmarks/tune_methods.py: what is drawn, which trial is the best, and going on from fewer trials."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest

from unlearn_ext.comparison.choosing import choose, complete

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tune_methods.py"


@pytest.fixture(scope="module")
def script():
    found = importlib.util.spec_from_file_location("tune_methods", SCRIPT)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_draws_are_seeded_and_within_their_space(script) -> None:
    space = {
        "a": ("log", 1e-3, 1e-1), "b": ("log", 2, 60), "c": ("choice", 1, None, "x"), "d": 0.9, "e": None,
        "f": ("together", {"g": 1, "h": 2}, {"g": 3, "h": 4}),
    }  # fmt: skip
    drawn = [script.draw(space, str(seed)) for seed in range(200)]
    assert drawn[3] == script.draw(space, "3") and drawn[3] != drawn[4]
    for one in drawn:
        assert 1e-3 <= one["a"] <= 1e-1 and one["a"] == float(f"{one['a']:.3g}")
        assert isinstance(one["b"], int) and 2 <= one["b"] <= 60
        assert one["d"] == 0.9 and one["e"] is None and "f" not in one
        assert (one["g"], one["h"]) in ((1, 2), (3, 4))
    assert {one["c"] for one in drawn} == {1, None, "x"} and {one["g"] for one in drawn} == {1, 3}
    assert 0.4 < sum(one["a"] < 1e-2 for one in drawn) / 200 < 0.6, "even in the logarithm"


def test_every_draw_of_every_space_is_a_method(script) -> None:
    for name, scenario in itertools.product(script.SPACES, ("random", "class")):
        for settings in script.draws(name, scenario, 6):
            (runner,) = choose([complete(name, settings)], "published", scenario)
            made = runner.settings()
            assert {key: made[key] for key in settings} == settings


def spread(mean: float | None) -> dict:
    return {"mean": mean, "std": 0.0, "values": [mean]}


def trial(gap, share, failed=(), forget=0.9, kept=0.9) -> dict:
    row = dict.fromkeys(("RA", "TA", "MIA_entropy"), spread(gap))
    told = {"gap": spread(gap), "CPU_share": spread(share), "FA": spread(forget), "TA_retained": spread(kept)}
    return {**row, **told, "failed": list(failed)}


def found(rows: dict) -> dict:
    references = {"original": {"gap": spread(1)}, "retrained": {"TA_retained": spread(0.95)}}
    return {"methods": rows, "references": references, "noise_floor": spread(2)}


def test_the_best_trial_is_the_smallest_gap_within_the_time(script) -> None:
    rows = {
        "published": trial(0.01, 3.0), "slow": trial(0.02, 0.3), "good": trial(0.03, 0.2), "worse": trial(0.04, 0.1),
        "broken": trial(None, None, ["inf"]),
    }  # fmt: skip
    drawn = [{}, {"lr": 1}, {"lr": 2}, {"lr": 3}, {"lr": 4}]
    got = script.summary(found(rows), drawn, 0.25, "random")
    assert got["best"]["settings"] == {"lr": 2} and got["published"]["gap"]["mean"] == 0.01
    assert got["best"]["CPU_share"] == {"mean": 0.2, "std": 0.0} and "trials" not in got, "what wins is kept"
    assert script.summary(found(rows), drawn, 0.01, "random")["best"] is None
    assert script.summary(found({"a": rows["good"]}), [{"lr": 2}], 0.25, "random")["published"] is None


def test_for_a_class_the_best_trial_has_forgotten_and_kept_where_one_has(script) -> None:
    rows = {
        "remembers": trial(0.01, 0.1, forget=0.021, kept=0.95), "loses": trial(0.02, 0.1, forget=0.0, kept=0.939),
        "both": trial(0.05, 0.1, forget=0.02, kept=0.94), "further": trial(0.06, 0.1, forget=0.0, kept=0.95),
        "slow": trial(0.01, 0.3, forget=0.0, kept=0.95),
    }  # fmt: skip
    drawn = [{"lr": number} for number in range(1, 6)]
    assert script.summary(found(rows), drawn, 0.25, "class")["best"]["settings"] == {"lr": 3}
    assert script.summary(found(rows), drawn, 0.25, "random")["best"]["settings"] == {"lr": 1}
    rest = {name: rows[name] for name in ("loses", "remembers")}
    assert script.summary(found(rest), drawn[:2], 0.25, "class")["best"]["settings"] == {"lr": 2}


@pytest.fixture
def tune(script, tmp_path, monkeypatch, capsys):
    """Runs the script, and gives its exit code and what it printed."""

    def run(*further: str) -> tuple[int, str, str]:
        options = [
            "--seeds", "1", "--train-size", "100", "--held-out-size", "0", "--test-size", "100", "--epochs", "2",
            "--cache-dir", tmp_path / "models", "--work-dir", tmp_path / "runs", "--json", tmp_path / "tuned.json",
            "--cpu-limit", "1000", "--without-published", *further,
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["tune_methods.py", *map(str, options)])
        code = script.main()
        return code, *capsys.readouterr()

    return run


@pytest.mark.slow
def test_the_script_goes_on_from_fewer_trials(tune, script, tmp_path, monkeypatch) -> None:
    pytest.importorskip("mlxtend")
    for name in ("gradient_ascent", "finetune"):
        monkeypatch.setitem(script.SPACES, name, script.space((1, 3)))
    methods = ("--methods", "gradient_ascent,finetune")
    assert tune(*methods, "--trials", "1")[0] == 0
    first = json.loads((tmp_path / "tuned.json").read_text())
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.json")}
    assert len(kept) == 3  # one trial of each, and what the models give
    (tmp_path / "tuned.json").unlink()  # of another budget
    code, printed, _ = tune(*methods, "--trials", "2")
    assert code == 0
    second = json.loads((tmp_path / "tuned.json").read_text())
    assert all(path.stat().st_mtime_ns == changed for path, changed in kept.items())
    for name in ("gradient_ascent", "finetune"):
        trials = [json.loads(path.read_text()) for path in (tmp_path / "runs").rglob(f"seed100-{name}-*.json")]
        gaps = [one["record"]["metrics"]["gap"] for one in trials]
        assert len(gaps) == 2 and second["methods"][name]["best"]["gap"]["mean"] == min(gaps)
        assert first["methods"][name]["best"]["gap"]["mean"] in gaps
        assert second["protocol"]["seeds"] == [100]
    assert tune("--show")[1] == printed and '"finetune": {' in printed


@pytest.mark.slow
def test_other_methods_stay_and_other_searches_are_not_overwritten(tune, script, tmp_path, monkeypatch) -> None:
    pytest.importorskip("mlxtend")
    for name in ("gradient_ascent", "finetune"):
        monkeypatch.setitem(script.SPACES, name, script.space((1, 2)))
    file = tmp_path / "tuned.json"
    for name in ("gradient_ascent", "finetune"):
        assert tune("--methods", name, "--trials", "1")[0] == 0
    document = json.loads(file.read_text())
    assert list(document["methods"]) == ["gradient_ascent", "finetune"]
    before = file.read_text()
    for further in (["--trials", "2"], ["--trials", "1", "--cpu-limit", "1"], ["--trials", "1", "--epochs", "3"]):
        code, _, errors = tune("--methods", "finetune", *further)
        assert (
            code == 1 and errors == "error: --json holds a search of another budget or protocol: choose another file\n"
        )
    assert file.read_text() == before
    file.write_text("{")
    assert "is no JSON: choose another file" in tune("--show")[2]


def test_what_has_no_space_is_refused(tune) -> None:
    code, printed, errors = tune("--methods", "sfron:lambd=0.5")
    assert code == 1 and not printed
    assert errors.startswith("error: --methods: sfron:lambd=0.5 has no space to draw from: choose from finetune")
