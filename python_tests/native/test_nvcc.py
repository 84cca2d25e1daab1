"""Every CUDA source through nvcc, against the headers of whatever torch is installed: no GPU is needed for that."""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from unlearn_ext import _cuda, _native

pytestmark = pytest.mark.build

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = sorted(path.relative_to(CSRC).as_posix() for path in CSRC.rglob("*.cu"))
ARCHITECTURES = ("80", "90")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """What nvcc says of each source, warnings as errors, with the assembler's account of registers and spills."""
    try:
        compiler, flags = _cuda.nvcc_command(ARCHITECTURES)
    except _native.ToolchainError as error:
        if os.environ.get("UNLEARN_EXT_REQUIRE_NVCC") == "1":
            pytest.fail(f"{error}; or set ALLOW_NO_NVCC=1")
        pytest.skip(str(error))
    work = tmp_path_factory.mktemp("nvcc")
    include = Path(torch.__file__).parent / "include"
    strict = ("-Werror", "all-warnings", "-Xptxas", "-v", "-I", str(CSRC), "-isystem", str(include))

    def compile_one(name: str) -> subprocess.CompletedProcess[str]:
        command = [*compiler, *flags, *strict, "-c", str(CSRC / name), "-o", str(work / f"{Path(name).stem}.o")]
        return subprocess.run(command, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SOURCES, pool.map(compile_one, SOURCES), strict=True))


@pytest.mark.parametrize("name", SOURCES)
def test_compiles_without_warnings(compiled: dict[str, subprocess.CompletedProcess[str]], name: str) -> None:
    assert compiled[name].returncode == 0, compiled[name].stderr[-4000:]


@pytest.mark.parametrize("name", SOURCES)
def test_no_kernel_spills_or_has_a_stack(compiled: dict[str, subprocess.CompletedProcess[str]], name: str) -> None:
    report = compiled[name].stdout + compiled[name].stderr
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    kernels = len(re.findall(r"Compiling entry function", report))
    assert kernels > 0 and len(found) >= kernels and kernels % len(ARCHITECTURES) == 0
    assert set(found) == {("0", "0", "0")}, report[-4000:]


def test_the_step_has_every_variant(compiled: dict[str, subprocess.CompletedProcess[str]]) -> None:
    """4 rules, 3 choices of gradients, with and without interpolation, and interpolation alone; two opmath types."""
    report = compiled["cuda/step.cu"].stdout + compiled["cuda/step.cu"].stderr
    assert len(re.findall(r"Compiling entry function", report)) == (4 * 3 * 2 + 1) * 2 * len(ARCHITECTURES)
