"""Every file of examples/ runs as it stands, and what it prints shows that it did what it is about."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import environment

pytestmark = pytest.mark.native_only

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = ("own_loop", "own_method", "own_task")
SLOW = ("classifier", "diffusion_class", "diffusion_concept", "hypergradient")


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"[-+]?\d+\.\d+", text)]


def run(name: str, capsys: pytest.CaptureFixture) -> list[str]:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_every_example_is_run_and_short() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*QUICK, *SLOW, "fsdp"}
    assert all(len(path.read_text().splitlines()) < 80 for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_an_example_does_what_it_is_about(name, capsys) -> None:
    lines = run(name, capsys)
    if name in ("own_loop", "own_method", "classifier"):
        *_, line = (line for line in lines if "the others" in line)
        forgotten, kept = numbers(line)
        assert forgotten <= 5 and kept >= 90, line
    elif name == "own_task":
        before, after = (numbers(line) for line in lines if line.startswith("squared error"))
        assert after[0] > 1.5 * before[0] and after[1] < 1.5 * before[1], lines
    elif name == "hypergradient":
        gaps = [abs(numbers(line)[1]) for line in lines]
        assert gaps[-1] < gaps[0] / 2, lines
    else:
        (before, after), *_ = (numbers(line) for line in lines if line.startswith("distance"))
        assert after < 0.7 * before, lines


@pytest.mark.ranks
@pytest.mark.process
def test_the_sharded_example_runs_on_two_ranks() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(EXAMPLES / "fsdp.py")]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0 and "on 2 ranks: Result(20 iterations" in ended.stdout, ended.stderr
