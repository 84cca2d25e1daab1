"""The CUDA kernels on the host: the operator tests, the sanitizers, launches counted, the CPU's bits.

What a GPU alone can show (streams, graphs, synchronisation, races) is in test_cuda.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_sanitizers as sanitizers
import torch
from helpers import cuda_host
from helpers.layouts import PYTHON_BACKEND
from test_python_backend import ALIKE, OPERATOR_FILES

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(PYTHON_BACKEND, reason="there are no kernels in this session")

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
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cuda_host.build(tmp_path_factory.mktemp("cuda_on_host"))


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


def run(script: str, *arguments: object, python_path: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), python_path]))}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_operator_tests_pass(library: Path) -> None:
    environment = os.environ | {"UNLEARN_EXT_TEST_LIBRARY": str(library), "PYTHONPATH": str(ROOT)}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-k", f"not inductor and not {ALIKE}"]  # long, and no business of the kernels
    files = [str(ROOT / "python_tests" / name) for name in OPERATOR_FILES]
    done = subprocess.run([*command, *files], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


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


LAUNCHES = r"""
import ctypes, sys
from pathlib import Path
import torch
from unlearn_ext import _native, ops

_native._find_or_build = lambda: Path(sys.argv[1])
ops.backend()
count = ctypes.CDLL(sys.argv[1]).cuda_on_host_launches
n = int(sys.argv[2])

def tensors(dtype=torch.float32):
    return [torch.rand(40, dtype=dtype) for _ in range(n)]

def launches(function, *args, **options):
    before = count()
    function(*args, **options)
    return count() - before

bits = ops.pack_bits([torch.rand(40) < 0.5 for _ in range(n)])
adamw = {"rule": "adamw", "scalars": ops.scalars(lr=0.1)}
print(launches(ops.step_, tensors(), forget_grads=tensors(), bits=bits, first_moments=tensors(),
               second_moments=tensors(), **adamw))
print(launches(ops.step_, tensors(), retain_grads=tensors(), slow=tensors(), first_moments=tensors(),
               second_moments=tensors(), **adamw))
print(launches(ops.step_, tensors(), forget_grads=tensors(), retain_grads=tensors(), slow=tensors(), bits=bits,
               rule="sgd", scalars=ops.scalars(lr=0.1)))
print(launches(ops.step_, tensors(), forget_grads=tensors(), retain_grads=tensors(), slow=tensors(), bits=bits,
               first_moments=tensors(), second_moments=tensors(), **adamw))
print(launches(ops.accumulate_fisher_, tensors(), tensors(torch.bfloat16)))
print(launches(ops.ratio_bits, tensors(), tensors()))
print(launches(ops.gradient_products, tensors(), tensors(), bits))
"""


@pytest.mark.parametrize("count", [1, 538, 686, 1300])
def test_one_launch_as_long_as_the_table_holds_the_list(library: Path, count: int) -> None:
    """538 tensors has diffusers' DiT-XL/2, 686 Stable Diffusion's UNet."""
    done = run(LAUNCHES, library, count)
    assert done.returncode == 0, done.stderr
    columns = (5, 5, 5, 7, 2, 3)
    wanted = [-(-count // (4032 // (c + 2))) for c in columns]
    assert wanted[:3] == [1, 1, 1] or count > 576
    *own, products = map(int, done.stdout.split())
    assert own == wanted
    assert products == -(-count // (4032 // 5)) + 1  # and one that combines the partial sums


LOOP = r"""
import sys
from pathlib import Path
import torch
from helpers.layouts import CONTIGUOUS, MISALIGNED, Arena
from unlearn_ext.profiling import loop

loop._schemas()
torch.ops.load_library(sys.argv[1])
kernels = torch.ops.unlearn_ext_bench
rng = torch.Generator().manual_seed(7)
SHAPES = [(0,), (8,), (7,), (33,), (1025,), (5, 50)]
LAYOUTS = [CONTIGUOUS, MISALIGNED] * 3
BITS = {2: torch.int16, 4: torch.int32}

def stream(arena, dtype):  # any bits at all, NaNs among them
    return arena.place_each([random(s, dtype.itemsize).view(dtype) for s in SHAPES], LAYOUTS)

def random(shape, width):
    limit = 2 ** (8 * width - 1)
    return torch.randint(-limit, limit, shape, generator=rng).to(BITS[width])

def words(arena):
    return [arena.place(random(((torch.Size(s).numel() + 31) // 32,), 4)) for s in SHAPES]

def stored(tensor):  # the bits as numbers from 0
    width = tensor.element_size()
    return tensor.contiguous().view(BITS[width]).long().flatten() & (2 ** (8 * width) - 1)

def check(first, gradients, updated, read, with_words, with_written, mask):
    arena = Arena()
    streams = [stream(arena, first if s == 0 else torch.float32) for s in range(updated)]
    sources = [stream(arena, gradients) for _ in range(read)]
    bits, written = words(arena) if with_words else [], words(arena) if with_written else []
    fixed = [t for s in sources for t in s] + bits
    before = [stored(t) for t in fixed]
    old = [[stored(t) for t in s] for s in streams]
    kernels.same_traffic_([t for s in streams for t in s], [t for s in sources for t in s], bits, written,
                          len(SHAPES), mask)
    arena.check()
    assert all(torch.equal(stored(t), b) for t, b in zip(fixed, before))
    for t, shape in enumerate(SHAPES):
        n = torch.Size(shape).numel()
        octets = bits[t].view(torch.uint8).long().repeat_interleave(8)[:n] if bits else torch.zeros(n).long()
        for s in sources:
            octets = octets ^ stored(s[t])
        for s, was in zip(streams, old):
            limit = 2 ** (8 * s[t].element_size()) - 1
            assert torch.equal(stored(s[t]), was[t] ^ (octets & mask & limit)), (shape, mask)
        if written:
            padded = torch.zeros(32 * ((n + 31) // 32)).long()
            padded[:n] = octets
            folded = torch.zeros(len(padded) // 8).long()
            for k in range(8):
                folded ^= padded[k::8]
            assert torch.equal(stored(written[t].view(torch.uint8).to(torch.int16)), folded & 255), shape

for first in (torch.float32, torch.bfloat16):
    for gradients in (torch.float32, torch.float16):
        for updated in range(5):
            for read in range(3):
                for with_words, with_written in ((True, False), (False, updated == 0)):
                    if updated + read:
                        for mask in (0, 2**32 - 1) if updated else (0,):
                            check(first, gradients, updated, read, with_words, with_written, mask)
SHAPES, LAYOUTS = SHAPES * 80, LAYOUTS * 80  # more than one launch takes
check(torch.bfloat16, torch.float32, 4, 2, True, False, 2**32 - 1)
arena = Arena()
a, c = ([torch.randn(s, generator=rng) for s in SHAPES] for _ in range(2))
a, b, c = (arena.place_each(values, LAYOUTS) for values in (a, a, c))
kernels.triad_(a, b, c, 0.0)
assert all(torch.equal(x, y) for x, y in zip(a, b))
kernels.triad_(a, b, c, 0.5)
assert all(torch.allclose(x, y + 0.5 * z, rtol=1e-6) for x, y, z in zip(a, b, c))
arena.check()
print("finished")
"""


def test_the_loop_leaves_everything_as_it_is_and_misses_nothing(tmp_path: Path) -> None:
    """With a mask of 0 nothing may change, with one of all bits every number of every stream by what the others hold;
    nothing beyond a tensor's ends may be written either way."""
    library = cuda_host._native._build_cached(cuda_host.loop_recipe(), tmp_path)
    done = run(LOOP, library, python_path=str(ROOT / "python_tests"))
    assert done.returncode == 0 and done.stdout.split() == ["finished"], done.stderr[-4000:]


SUMS = r"""
import sys
from pathlib import Path
import torch
from unlearn_ext import _native, ops

if sys.argv[1] != "own":
    _native._find_or_build = lambda: Path(sys.argv[1])
torch.manual_seed(1)
results = []
shapes = [(), (0,), (31,), (64, 65), (100003,), (7, 5, 3), (50_000,)] + [(n,) for n in range(1, 90)]
for forget_dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    f = [torch.randn(shape, dtype=torch.float64).to(forget_dtype) for shape in shapes]
    for retain_dtype in (torch.float32, torch.bfloat16):
        r = [torch.randn(shape, dtype=torch.float64).to(retain_dtype) for shape in shapes]
        bits = ops.pack_bits([torch.rand(shape) < 0.4 for shape in shapes])
        for scope in ("forget", "all"):
            results += [ops.gradient_products(f, r, bits, scope), ops.gradient_products(f, (), bits, scope)]
            results += [ops.gradient_products((), r, bits, scope)]
torch.save(results, sys.argv[2])
"""


def test_the_sums_are_the_cpus_bits(library: Path, tmp_path: Path) -> None:
    """The same lanes, blocks and tree. Products of float64 gradients may be fused into sums differently."""
    for name, path in (("cuda", library), ("cpu", "own")):
        done = run(SUMS, path, tmp_path / f"{name}.pt")
        assert done.returncode == 0, done.stderr
    cuda, cpu = (torch.load(tmp_path / f"{name}.pt") for name in ("cuda", "cpu"))
    assert len(cuda) == len(cpu) == 48
    for i, (a, b) in enumerate(zip(cuda, cpu, strict=True)):
        if i < 12:
            torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
        else:
            assert torch.equal(a, b)


def test_sums_of_many_blocks_are_combined_in_the_cpus_order(library: Path, tmp_path: Path) -> None:
    """2.2 million weights are 538 blocks: more than one thread block combines."""
    script = SUMS.replace("(50_000,)", "(2_200_000,)").replace("torch.float64, torch.float32, torch.bfloat16", "")
    script = script.replace("(, torch.float16)", "(torch.float32,)")
    for name, path in (("cuda", library), ("cpu", "own")):
        done = run(script, path, tmp_path / f"{name}.pt")
        assert done.returncode == 0, done.stderr
    cuda, cpu = (torch.load(tmp_path / f"{name}.pt") for name in ("cuda", "cpu"))
    assert all(torch.equal(a, b) for a, b in zip(cuda, cpu, strict=True))
