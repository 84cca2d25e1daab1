"""Every CUDA source through nvcc, against the headers of whatever torch is installed: no GPU is needed for that."""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from unlearn_ext.native import cuda, loading

pytestmark = pytest.mark.build

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# Two translation units, as the library is built: each pays ten seconds for the headers.
LARGEST = "cuda/step.cu"
OTHERS = [path.relative_to(CSRC).as_posix() for path in sorted(CSRC.rglob("*.cu")) if path != CSRC / LARGEST]
UNITS = {"step": [LARGEST], "others": OTHERS}
# One intermediate code, assembled for each: it is the same where no source asks which it is compiled for.
ARCHITECTURES = ("80", "90")
GENERATE = ("-gencode", f"arch=compute_{ARCHITECTURES[0]},code=[{','.join(f'sm_{a}' for a in ARCHITECTURES)}]")


def test_no_source_asks_for_the_architecture() -> None:
    for path in [*CSRC.rglob("*.cu"), *CSRC.rglob("*.cuh"), *CSRC.rglob("*.h")]:
        for line in path.read_text().splitlines():
            assert not re.search(
                r"__CUDA_ARCH|__CUDA_MINIMUM_ARCH|\basm\b", line.replace("defined(__CUDA_ARCH__)", "")
            ), f"{path.name}: {line}: compile for each architecture by itself"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """What nvcc says of each unit, warnings as errors, with the assembler's account of registers and spills."""
    try:
        compiler, flags = cuda.nvcc_command(())
    except loading.ToolchainError as error:
        if os.environ.get("UNLEARN_EXT_REQUIRE_NVCC") == "1":
            pytest.fail(f"{error}; or set ALLOW_NO_NVCC=1")
        pytest.skip(str(error))
    work = tmp_path_factory.mktemp("nvcc")
    include = Path(torch.__file__).parent / "include"
    strict = ("-Werror", "all-warnings", "-Xptxas", "-v", "-I", str(CSRC), "-isystem", str(include))

    def compile_one(name: str) -> subprocess.CompletedProcess[str]:
        unit = work / f"{name}.cu"
        unit.write_text("".join(f'#include "{source}"\n' for source in UNITS[name]))
        command = [*compiler, *flags, *GENERATE, *strict, "-c", str(unit), "-o", str(unit.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(UNITS, pool.map(compile_one, UNITS), strict=True))


@pytest.mark.parametrize("name", UNITS)
def test_compiles_without_warnings(compiled: dict[str, subprocess.CompletedProcess[str]], name: str) -> None:
    assert compiled[name].returncode == 0, compiled[name].stderr[-4000:]


@pytest.mark.parametrize("name", UNITS)
def test_no_kernel_spills_or_has_a_stack(compiled: dict[str, subprocess.CompletedProcess[str]], name: str) -> None:
    report = compiled[name].stdout + compiled[name].stderr
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    kernels = len(re.findall(r"Compiling entry function", report))
    assert kernels > 0 and len(found) >= kernels and kernels % len(ARCHITECTURES) == 0
    assert set(found) == {("0", "0", "0")}, report[-4000:]


def test_the_step_has_every_variant(compiled: dict[str, subprocess.CompletedProcess[str]]) -> None:
    """4 rules, 3 choices of gradients, with and without interpolation, and interpolation alone; two opmath types."""
    report = compiled["step"].stdout + compiled["step"].stderr
    assert len(re.findall(r"Compiling entry function", report)) == (4 * 3 * 2 + 1) * 2 * len(ARCHITECTURES)
