"""Programs that tests start: files in a folder ``programs`` beside them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "TESTS", "environment", "run_program"]

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent


def environment(**changes: object) -> dict[str, str]:
    """This process's, with the package and the helpers on the path; a change to None removes a variable."""
    changed = {"PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", **changes}
    kept = {name: value for name, value in os.environ.items() if name not in changed}
    return kept | {name: str(value) for name, value in changed.items() if value is not None}


def run_program(program: Path, *arguments: object, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess:
    """Runs a program to its end; ``options`` are those of ``subprocess.run``."""
    settings = {"env": environment(), "capture_output": True, "text": True, "timeout": timeout, **options}
    return subprocess.run([sys.executable, str(program), *map(str, arguments)], **settings)
