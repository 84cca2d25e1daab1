"""The command unlearn-ext compare: going on after a kill, bad input, help."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import shared_digits

from unlearn_ext.cli import main


@pytest.fixture(autouse=True)
def digits_are_read_once(monkeypatch) -> None:
    monkeypatch.setattr("unlearn_ext.data.load_digits", shared_digits.digits)


def arguments(directory: Path, *further: str) -> list[str]:
    options = {
        "--train-size": 100, "--held-out-size": 50, "--test-size": 100, "--epochs": 2, "--batch-size": 32,
        "--seeds": 2, "--output-dir": directory / "out", "--cache-dir": directory / "cache",
        "--json": directory / "copy.json", "--settings": "published",
        "--methods": "sfron:iterations=3,sfron:iterations=4,lr=0.02",
    }  # fmt: skip
    options |= dict(zip(further[::2], further[1::2], strict=True))
    return ["compare", *(str(part) for pair in options.items() for part in pair)]


def without_timings(found: object) -> object:
    """Also without the command, which names the directory."""
    if isinstance(found, dict):
        drop = ("RTE", "RTE_share", "CPU", "CPU_share", "training_seconds", "timings", "command")
        return {key: without_timings(value) for key, value in found.items() if key not in drop}
    return [without_timings(value) for value in found] if isinstance(found, list) else found


@pytest.mark.process
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
    assert main([*arguments(whole), "--fresh"]) == 0 and ", found" not in capsys.readouterr().err
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
            "16 or more samples of the other classes that nobody trained on, and --held-out-size is 17: set more aside",
        ),
        (["--methods", "bad_teacher:seed=99999999999999999999999"], "seed: expected an integer from 0 to 2^64 - 1"),
        (["--seeds", "0"], "--seeds: expected an integer from 1, got 0"),
        (["--seed", "-1"], "--seed: expected an integer from 0"),
        (["--forget-fraction", "1.0"], "something must be forgotten and something kept"),
        (["--forget-fraction", "0.001"], "of 100 samples is 0: something must be forgotten"),
        (["--scenario", "class", "--forget-class", "10"], "--forget-class: expected a digit from 0 to 9, got 10"),
        (["--forget-class", "5"], "--forget-class belongs to --scenario class: leave it out with --scenario random"),
        (["--scenario", "class", "--forget-fraction", "0.2"], "--forget-fraction belongs to --scenario random"),
        (["--train-size", "5"], "--train-size: expected at least 10, one digit of each class, got 5"),
        (["--test-size", "5"], "--test-size: expected at least 10"),
        (["--held-out-size", "-1"], "--held-out-size: expected 0 (none) or more, got -1"),
        (["--train-size", "4000", "--test-size", "2000"], "are 6050 digits and there are 5000: lower one of them"),
        (["--epochs", "0"], "--epochs: expected an integer from 1"),
        (["--batch-size", "0"], "--batch-size: expected an integer from 1"),
        (["--json", "missing/file.json"], "expected a file in a directory that exists"),
        (["--device", "toaster"], "expected one such as 'cpu'"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(further, words, tmp_path, capsys) -> None:
    assert main(arguments(tmp_path, *further)) == 1
    written = capsys.readouterr()
    assert written.err.startswith("error: ") and written.err.count("\n") == 1 and words in written.err
    assert not written.out and not list(tmp_path.iterdir()), "nothing is written before all is checked"


def test_help_fits_and_names_the_options(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["compare", "--help"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for option in ("--methods", "--seed", "--seeds", "--scenario", "--train-size", "--forget-fraction", "--json"):
        assert option in out
