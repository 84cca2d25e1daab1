"""csrc/cuda compiled for the host, so that machines without a GPU run its kernels: see cuda_on_host/."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from unlearn_ext.native import building, recipes

STAND_INS = Path(__file__).resolve().parents[1] / "native" / "cuda_on_host"


def recipe(csrc: Path | None = None) -> recipes.Recipe:
    """The CUDA operators registered for CPU tensors. Optimised, so that products are fused into sums as nvcc does."""
    base = recipes.cpu_recipe(csrc)
    rooms = [path for room in ("operators", "tensors") for path in sorted((base.csrc / room).glob("*.cpp"))]
    sources = [path.relative_to(base.csrc).as_posix() for path in [*sorted((base.csrc / "cuda").glob("*.cu")), *rooms]]
    sources.sort(key=lambda source: source != "cuda/step.cu")
    flags = ("-O2", "-DUSE_CUDA", "-DUNLEARN_CUDA_KEY=CPU", f"-I{STAND_INS}", "-x", "c++")
    flags += ("-DUNLEARN_CUDA_THREADS=64",)  # a switch of threads is what costs time here
    # The sanitizers' flags, where there are any, come last and win.
    extra = ("-Og", "-g1") if "-Og" in base.flags else ()
    return dataclasses.replace(
        base,
        file_name="libcuda_on_host.so",
        sources=(*sources, str(STAND_INS / "runtime.cpp")),
        flags=(*base.flags, *flags, *extra),
    )


def loop_recipe() -> recipes.Recipe:
    """The same-traffic loop, in the same way."""
    sources = ("benchmark/loop.cu", "tensors/operands.cpp", str(STAND_INS / "runtime.cpp"))
    return dataclasses.replace(recipe(), file_name="libcuda_loop_on_host.so", sources=sources)


def build(cache: Path | None = None, csrc: Path | None = None) -> Path:
    return building.build_cached(recipe(csrc), cache)
