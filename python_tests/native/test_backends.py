"""The session's own option: which backend's operators the tests run, and what CI may rely on."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers.backends import BACKENDS, PYTHON_BACKEND
from helpers.processes import ROOT, environment

from unlearn_ext import ops


def session(*options: str, **variables: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", *options]
    return subprocess.run(command, env=environment(**variables), cwd=ROOT, capture_output=True, text=True)


def test_the_backend_is_the_one_that_was_asked_for() -> None:
    assert ops.backend() == ("python" if PYTHON_BACKEND else "native")


@pytest.mark.process
def test_a_session_that_requires_the_native_path_ends_without_it() -> None:
    done = session("python_tests/ops/test_step.py", UNLEARN_EXT_REQUIRE_NATIVE=1, UNLEARN_EXT_BACKEND="python")
    assert done.returncode == 1 and "the backend is 'python'" in done.stdout + done.stderr


@pytest.mark.process
def test_an_unknown_backend_is_refused() -> None:
    done = session("--backend=fast")
    assert done.returncode == 4 and all(name in done.stderr for name in BACKENDS)


@pytest.mark.process
def test_other_backends_run_the_operators_tests_alone() -> None:
    done = session("--backend=python")
    files = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    rooms = {name.split("/")[1] for name in files}
    assert done.returncode == 0 and rooms == {"ops", "optim", "saliency", "run"}
    assert {name for name in files if "/run/" in name} == {"python_tests/run/test_trajectory.py"}
