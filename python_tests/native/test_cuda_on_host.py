"""The CUDA kernels on the host: the operator tests, the sanitizers, launches counted, the CPU's bits.

What a GPU alone can show (streams, graphs, synchronisation, races) is in test_cuda.py.
"""

from __future__ import annotations

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import cuda_host, sanitizers
from helpers.backends import PYTHON_BACKEND
from helpers.processes import run_program

from unlearn_ext.native import building

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.build, pytest.mark.skipif(PYTHON_BACKEND, reason="there are no kernels in this session")]

# One lane's sum more than there are weights: seen where a tensor ends within an octet.
RIGHT = "if (k < n) to[k] = values[k];"
WRONG = "if (k <= n) to[k] = values[k];"


def broken_copy(target: Path) -> Path:
    """The sources of one operator, the quickest to compile, with a store that goes one weight too far."""
    shutil.copytree(ROOT / "csrc", target)
    for path in (target / "cuda").glob("*.cu"):
        if path.name != "fisher.cu":
            path.unlink()
    source = target / "cuda" / "octet.cuh"
    text = source.read_text()
    assert text.count(RIGHT) == 2, "octet.cuh has changed: choose another place for the fault"
    source.write_text(text.replace(RIGHT, WRONG))
    return target


@pytest.fixture(scope="module")
def library() -> Path:
    """In the cache, where a session with --backend=cuda-on-host finds it."""
    return cuda_host.build()


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The libraries that are built with the sanitizers."""
    if sanitizers.runtime("libasan.so") is None:
        if os.environ.get("UNLEARN_EXT_REQUIRE_NATIVE") == "1":
            pytest.fail("the compiler has no libasan: install the sanitizer runtimes")
        pytest.skip("the compiler has no sanitizer runtime")
    work = tmp_path_factory.mktemp("cuda_sanitizers")
    sources = {"whole": ROOT / "csrc", "broken": broken_copy(work / "csrc")}
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv("UNLEARN_EXT_CXXFLAGS", sanitizers.FLAGS)
        built = pool.map(lambda csrc: cuda_host.build(work / "cache", csrc), sources.values())
        return dict(zip(sources, built, strict=True))


def test_the_kernels_are_clean(checked: dict[str, Path]) -> None:
    result = sanitizers.check(checked["whole"], *sanitizers.OPERATORS)
    assert result.returncode == 0, result.stderr[-6000:]
    assert result.stdout.split() == ["finished", "native"]
    assert not re.search("runtime error|Sanitizer", result.stderr), result.stderr[-6000:]


def test_one_weight_too_many_is_caught(checked: dict[str, Path]) -> None:
    result = sanitizers.check(checked["broken"], "fisher_float")
    assert result.returncode != 0 and "finished" not in result.stdout
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr, result.stderr[-6000:]
    assert "fisher_kernel" in result.stderr


LAUNCHES = Path(__file__).parent / "programs" / "launches.py"


def test_one_launch_as_long_as_the_table_holds_the_list(library: Path) -> None:
    """538 tensors has diffusers' DiT-XL/2, 686 Stable Diffusion's UNet."""
    counts = (1, 538, 686, 1300)
    done = run_program(LAUNCHES, library, *counts)
    assert done.returncode == 0, done.stderr
    columns = (5, 5, 5, 7, 2, 3)
    for count, line in zip(counts, done.stdout.splitlines(), strict=True):
        wanted = [-(-count // (4032 // (c + 2))) for c in columns]
        assert wanted[:3] == [1, 1, 1] or count > 576
        *own, products = map(int, line.split())
        assert own == wanted, count
        assert products == -(-count // (4032 // 5)) + 1, count  # and one that combines the partial sums


LOOP = Path(__file__).parent / "programs" / "same_traffic_loop.py"


def test_the_loop_leaves_everything_as_it_is_and_misses_nothing(tmp_path: Path) -> None:
    """With a mask of 0 nothing may change, with one of all bits every number of every stream by what the others hold;
    nothing beyond a tensor's ends may be written either way."""
    library = building.build_cached(cuda_host.loop_recipe(), tmp_path)
    done = run_program(LOOP, library)
    assert done.returncode == 0 and done.stdout.split() == ["finished"], done.stderr[-4000:]


SUMS = Path(__file__).parent / "programs" / "gradient_sums.py"


@pytest.fixture(scope="module")
def sums(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[torch.Tensor]]]:
    """Those of many lists, and those of large ones, by the CUDA kernels and by the CPU's."""
    found = {}
    for name, path in (("cuda", library), ("cpu", "own")):
        file = tmp_path_factory.mktemp("sums") / f"{name}.pt"
        done = run_program(SUMS, path, file)
        assert done.returncode == 0, done.stderr
        found[name] = torch.load(file)
    return found


def test_the_sums_are_the_cpus_bits(sums: dict[str, list[list[torch.Tensor]]]) -> None:
    """The same lanes, blocks and tree. Products of float64 gradients may be fused into sums differently."""
    cuda, cpu = (sums[name][0] for name in ("cuda", "cpu"))
    assert len(cuda) == len(cpu) == 48
    for i, (a, b) in enumerate(zip(cuda, cpu, strict=True)):
        if i < 12:
            torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
        else:
            assert torch.equal(a, b)


def test_sums_of_many_blocks_are_combined_in_the_cpus_order(sums: dict[str, list[list[torch.Tensor]]]) -> None:
    """2.2 million weights are 538 blocks: more than one thread block combines."""
    cuda, cpu = (sums[name][1] for name in ("cuda", "cpu"))
    assert all(torch.equal(a, b) for a, b in zip(cuda, cpu, strict=True))
