"""Options, order and fixtures of the test session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Options for this session are none for the sessions that tests start. Where sessions run side by side (pytest-xdist)
# each has one thread, set before torch makes its pool: threads that wait for each other's cores take many times longer.
os.environ.pop("PYTEST_ADDOPTS", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from helpers.layouts import SEED, Arena
from hypothesis import HealthCheck, settings

# The same examples on every run: a failure in CI is a failure everywhere.
settings.register_profile(
    "unlearn_ext",
    deadline=None,
    derandomize=True,
    max_examples=30,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("unlearn_ext")

if library := os.environ.get("UNLEARN_EXT_TEST_LIBRARY"):  # test_cuda_on_host.py runs the operator tests with its own
    from unlearn_ext import _native

    _native._find_or_build = lambda: Path(library)

if device := os.environ.get("UNLEARN_EXT_TEST_DEVICE"):  # test_cuda.py runs the operator tests on it
    from helpers import through_device

    through_device.install(device)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Where CI says that the native path must be the one tested, any other path fails the session."""
    if os.environ.get("UNLEARN_EXT_REQUIRE_NATIVE") != "1" or "UNLEARN_EXT_TEST_DEVICE" in os.environ:
        return
    from unlearn_ext import _native

    if (backend := _native.backend()) != "native":
        pytest.exit(f"UNLEARN_EXT_REQUIRE_NATIVE=1, but the backend is {backend!r}", returncode=1)


# Where files run side by side, those that take minutes must not be the last to begin; the longest first. (xdist keeps
# the order with --no-loadscope-reorder only.)
LONGEST = ("test_nvcc", "test_ranks", "test_python_backend", "test_cuda_on_host", "test_cli", "test_native")
LONGEST += ("test_benchmarks", "test_sanitizers", "test_update_gradients", "test_update_compiled")
LONGEST += ("test_diffusion_demo", "test_diffusion_pretraining")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena()
    yield arena
    arena.check()


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)
