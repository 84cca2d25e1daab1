"""The CPU kernels under the address and undefined-behaviour sanitizers, and proof that a small fault is caught.

The kernels' memory comes from PyTorch's allocator, which the preloaded runtime intercepts, so every tensor ends at
a poisoned zone. Libraries are built here and only loaded in the checked process: a compiler run under the
preloaded runtime would be checked as well, and slow.
"""

from __future__ import annotations

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.backends import PYTHON_BACKEND
from helpers.sanitizers import FLAGS, OPERATORS, ROOT, check, runtime

from unlearn_ext.native import building

pytestmark = [pytest.mark.build, pytest.mark.skipif(PYTHON_BACKEND, reason="there are no kernels in this session")]


# Two faults in one library, each for one dtype of the Fisher sums.
RIGHT = "T buffer[kStrip];"
FAULTS = """
  if (sizeof(T) == 8 && 1 << n == 3) return;                          // a shift by more than a word's width
  if (sizeof(T) == 4 && n < kStrip) fisher.at<T>(t, start)[n] = T(0); // one weight too many
"""


def broken_copy(target: Path) -> Path:
    """The sources of one operator, the quickest to compile, with the faults."""
    shutil.copytree(ROOT / "csrc", target)
    for path in (target / "cpu").glob("*.cpp"):
        if path.name not in ("fisher.cpp", "strips.cpp"):
            path.unlink()
    source = target / "cpu" / "fisher.cpp"
    text = source.read_text()
    assert text.count(RIGHT) == 1, "fisher.cpp has changed: choose another place for the faults"
    source.write_text(text.replace(RIGHT, RIGHT + FAULTS))
    return target


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    if runtime("libasan.so") is None:
        if os.environ.get("UNLEARN_EXT_REQUIRE_NATIVE") == "1":
            pytest.fail("the compiler has no libasan: install the sanitizer runtimes")
        pytest.skip("the compiler has no sanitizer runtime")
    work = tmp_path_factory.mktemp("sanitizers")
    sources = {"whole": ROOT / "csrc", "broken": broken_copy(work / "csrc")}
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv("UNLEARN_EXT_CXXFLAGS", FLAGS)
        built = pool.map(lambda csrc: building.build(csrc, work / "cache"), sources.values())
        return dict(zip(sources, built, strict=True))


def test_kernels_are_clean(libraries: dict[str, Path]) -> None:
    result = check(libraries["whole"], *OPERATORS)
    assert result.returncode == 0, result.stderr[-6000:]
    assert result.stdout.split() == ["finished", "native"]
    assert not re.search("runtime error|Sanitizer", result.stderr), result.stderr[-6000:]


def test_one_weight_too_many_is_caught(libraries: dict[str, Path]) -> None:
    result = check(libraries["broken"], "fisher_float")
    assert result.returncode != 0 and "finished" not in result.stdout
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr, result.stderr[-6000:]
    assert "accumulate_strip" in result.stderr


def test_undefined_behaviour_is_caught(libraries: dict[str, Path]) -> None:
    result = check(libraries["broken"], "fisher_double")
    assert result.returncode != 0 and "finished" not in result.stdout
    assert "runtime error: " in result.stderr, result.stderr[-6000:]
