"""The pure-PyTorch operators are held to the same tests as the native ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.layouts import PYTHON_BACKEND

HERE = Path(__file__).resolve().parent
OPERATOR_FILES = (
    "test_step.py",
    "test_products.py",
    "test_saliency_ops.py",
    "test_contracts.py",
    "test_update.py",
    "test_update_gradients.py",
    "test_update_graphs.py",
    "test_update_compiled.py",
    "test_top_bits.py",
)
FILES = (
    *OPERATOR_FILES,
    "test_optim.py",
    "test_optim_masks.py",
    "test_optim_not_finite.py",
    "test_optim_torch.py",
    "test_optim_state.py",
    "test_optim_refusals.py",
    "test_saliency.py",
    "test_mask_files.py",
    "test_fisher.py",
    "test_protection.py",
    "test_trajectory.py",
)
# Long, and the same ordinary operations whichever operators are there.
ALIKE = "second_derivatives"


@pytest.mark.skipif(PYTHON_BACKEND, reason="this session runs the pure-PyTorch operators already")
def test_the_same_tests_pass_without_the_native_library() -> None:
    probe = "from unlearn_ext import _native; print(_native.backend())"
    environment = os.environ | {"UNLEARN_EXT_BACKEND": "python", "PYTHONPATH": str(HERE.parent)}
    environment.pop("UNLEARN_EXT_REQUIRE_NATIVE", None)
    environment["OMP_NUM_THREADS"] = "1"  # on tensors this small threads cost more than they bring
    backend = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True)
    assert backend.stdout.split() == ["python"]

    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-k", f"not {ALIKE}"]
    files = [str(HERE / name) for name in FILES]
    run = subprocess.run([*command, *files], env=environment, cwd=HERE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


def test_a_session_that_requires_the_native_path_ends_without_it() -> None:
    environment = os.environ | {"UNLEARN_EXT_REQUIRE_NATIVE": "1", "UNLEARN_EXT_BACKEND": "python"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", str(HERE / FILES[0])]
    run = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True)
    assert run.returncode == 1 and "the backend is 'python'" in run.stdout + run.stderr
