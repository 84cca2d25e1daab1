"""The sanitizers' runtimes, and a process that calls operators under them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from unlearn_ext.native import loading, toolchain

ROOT = Path(__file__).resolve().parents[2]


# Light optimisation and line tables only: three times quicker to compile than -O1 -g.
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -Og -g1"


OPERATORS = (
    "step_",
    "gradient_products",
    "fisher_double",
    "fisher_float",
    "ratio_bits",
    "pack_bits",
    "many",
    "update",
    "top_bits",
)


SCRIPT = ROOT / "python_tests" / "native" / "programs" / "sanitized_operators.py"


def runtime(name: str) -> str | None:
    """The path of one of the compiler's runtime libraries."""
    try:
        compiler = toolchain.find_compiler()
    except loading.ToolchainError:
        return None
    command = [*compiler, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return path if os.path.isabs(path) and os.path.exists(path) else None


def check(library: Path, *operators: str) -> subprocess.CompletedProcess[str]:
    # libstdc++ comes along because Python does not link it: without it the runtime cannot intercept exceptions.
    preload = [runtime("libasan.so"), runtime("libstdc++.so")]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(filter(None, preload)),
        # Python frees little at its end; new and delete of PyTorch's own objects are not what is checked.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "UNLEARN_EXT_BACKEND": "native",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(SCRIPT), str(library), *operators]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
