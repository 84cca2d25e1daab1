"""Every parser, on a few thousand mutated files: its own error or a result, in time and in little memory.

The inputs are the same on every run. One alone: ``python_tests/fuzz/programs/fuzz_parsers.py FOLDER 100 "class map of
JSON"``, with the package and python_tests on the path.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import run_program

PROGRAM = Path(__file__).parent / "programs" / "fuzz_parsers.py"
INPUTS = 100  # for each parser
GROWTH = 256 << 20  # bytes that reading them may add to the process

PARSERS = [f"method text {i}" for i in range(5)]
PARSERS += ["mask", "mask of torch.save", "mask of old torch.save", "Fisher of torch.save"]
PARSERS += ["class map of JSON", "class map of a list", "class map of lines", "prompts"]
PARSERS += ["npz", "compressed npz", "array safetensors", "png", "jpg", "webp", "bmp", "shapes to profile"]
PARSERS += [
    "history",
    "state of a checkpoint",
    "sealed state of a checkpoint",
    "secret",
    "certificate",
    "published weights",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.process,
    pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is read from /proc"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    done = run_program(PROGRAM, tmp_path_factory.mktemp("fuzz") / "files", INPUTS, timeout=600)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {line["ended"]: line for line in lines if "ended" in line}
    for line in lines:  # a crash ends the program
        if line.get("begins") not in (None, *found):
            found[line["begins"]] = {"crash": f"exit {done.returncode}: {done.stderr[-500:]}"}
    assert found, done.stderr[-2000:]
    return found


def test_all_parsers_were_read(results: dict[str, dict[str, Any]]) -> None:
    assert sorted(results) == sorted(PARSERS)
    refused = sum(result.get("refused", 0) for result in results.values())
    assert refused > INPUTS * len(PARSERS) // 4  # the changes are not all harmless


@pytest.mark.parametrize("parser", PARSERS)
def test_mutated_files_end_in_the_projects_own_error(parser: str, results: dict[str, dict[str, Any]]) -> None:
    result = results[parser]
    assert "crash" not in result, result["crash"]
    assert result["failed"] == 0, "\n".join([f"{result['failed']} of {INPUTS} inputs:", *result["failures"]])
    assert result["inputs"] == INPUTS and result["grown"] < GROWTH
