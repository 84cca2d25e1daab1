"""The implementations of the operators. A session tests one of them: ``pytest --backend=NAME``.

``native`` are the CPU kernels, and every test is theirs. The others run the tests of what they implement:
``python`` is pure PyTorch, ``cuda-on-host`` the CUDA kernels compiled for the CPU, ``cuda`` the same on a GPU.
"""

from __future__ import annotations

import os
from pathlib import Path

BACKENDS = ("native", "python", "cuda-on-host", "cuda")
# Folders and files of python_tests.
_OPERATORS = ("ops",)
_TESTS = {
    "python": (*_OPERATORS, "optim", "saliency", "run/test_trajectory.py"),
    "cuda-on-host": _OPERATORS,
    "cuda": _OPERATORS,
}

PYTHON_BACKEND = os.environ.get("UNLEARN_EXT_BACKEND") == "python"


def install(backend: str) -> None:
    """Puts a backend in the place of the native one; before any operator is called."""
    if backend == "cuda-on-host":
        from helpers import cuda_host

        from unlearn_ext.native import loading

        library = cuda_host.build()
        loading._find_or_build = lambda: library
    elif backend == "cuda":
        from helpers import through_device

        through_device.install(os.environ.get("UNLEARN_EXT_TEST_DEVICE", "cuda"))


def is_tested(backend: str, path: Path, tests: Path) -> bool:
    """Whether a file of the folder ``tests`` has tests of a backend."""
    relative = path.relative_to(tests).as_posix()
    return backend == "native" or any(relative == part or relative.startswith(f"{part}/") for part in _TESTS[backend])
