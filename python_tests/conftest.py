"""Options, order and fixtures of the test session."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Set before torch makes its pool: on networks as small as the tests' a second thread costs more than it brings, and
# where sessions run side by side (pytest-xdist) threads wait for each other's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from helpers.layouts import Arena

TESTS = Path(__file__).resolve().parent

# The same examples on every run: a failure in CI is a failure everywhere.
COMMON = {
    "deadline": None,
    "derandomize": True,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("dev", max_examples=10, **COMMON)
settings.register_profile("ci", max_examples=30, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=("native", "python", "cuda-on-host", "cuda"),
        help="implementation of the operators under test: native (CPU kernels, the default), python (pure PyTorch), "
        "cuda-on-host (CUDA kernels compiled for the CPU) or cuda",
    )


def backend_of(config: pytest.Config) -> str:
    return config.getoption("--backend") or os.environ.get("UNLEARN_EXT_BACKEND") or "native"


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background jobs ignore Ctrl-C, and nohup the end of the terminal; so would what tests interrupt.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    backend = backend_of(config)
    os.environ["UNLEARN_EXT_BACKEND"] = "python" if backend == "python" else "native"
    from helpers import backends  # which reads the variable

    backends.install(backend)


def pytest_report_header(config: pytest.Config) -> str:
    return f"backend: {backend_of(config)}"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Where CI says that the native path must be the one tested, any other path fails the session."""
    if os.environ.get("UNLEARN_EXT_REQUIRE_NATIVE") != "1" or session.config.getoption("--backend"):
        return
    from unlearn_ext.native import loading

    if (backend := loading.backend()) != "native":
        pytest.exit(f"UNLEARN_EXT_REQUIRE_NATIVE=1, but the backend is {backend!r}", returncode=1)


# Where files run side by side, those that take minutes must not be the last to begin; the longest first. (xdist keeps
# the order with --no-loadscope-reorder only.)
LONGEST = ("test_nvcc", "test_ranks", "test_cuda_on_host", "test_cli", "test_native")
LONGEST += ("test_benchmarks", "test_sanitizers", "test_update_gradients", "test_update_compiled")
LONGEST += ("test_diffusion_demo", "test_diffusion_pretraining")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from helpers.backends import is_tested

    # Options for this session are none for the sessions that tests start; xdist's workers have read them by now.
    os.environ.pop("PYTEST_ADDOPTS", None)
    backend = backend_of(config)
    if backend != "native":
        chosen = [x for x in items if is_tested(backend, x.path, TESTS) and not x.get_closest_marker("native_only")]
        config.hook.pytest_deselected(items=[x for x in items if x not in set(chosen)])
        items[:] = chosen
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk() -> Iterator[None]:
    """Which only a loss of power would show; that files are synced, and in which order, tests see by the calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def arena() -> Iterator[Arena]:
    from helpers.layouts import Arena

    arena = Arena()
    yield arena
    arena.check()


@pytest.fixture
def rng() -> torch.Generator:
    from helpers.layouts import SEED

    return torch.Generator().manual_seed(SEED)
