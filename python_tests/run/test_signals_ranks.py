"""A signal to one of several ranks ends all of them after the same iteration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.models import make
from helpers.runs import run

PROGRAM = Path(__file__).parents[1] / "helpers" / "programs" / "signal_one_rank.py"


@pytest.mark.ranks
@pytest.mark.slow
def test_all_ranks_end_together(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, PROGRAM, tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    expected = {"exit_code": 143, "iteration": 5, "checkpoint": str(tmp_path / "run" / "checkpoint-5")}
    assert found == [expected, expected]
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["checkpoint-4", "checkpoint-5", "history.jsonl"]
    result = run(make(), output_dir=tmp_path / "run", resume_from_checkpoint="latest")
    assert [entry["iteration"] for entry in result.history] == list(range(12))
