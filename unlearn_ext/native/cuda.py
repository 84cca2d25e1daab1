"""Build the CUDA kernels: find nvcc, choose architectures, say what is missing.

They are a library of their own beside the CPU's, built when the first CUDA tensor meets an operator. nvcc compiles
every source of it and links CUDA's runtime statically, so any driver that runs torch's CUDA runs it.

Environment:

- ``CUDA_HOME``: where a toolkit is; otherwise nvcc from the PATH, else from NVIDIA's pip packages.
- ``TORCH_CUDA_ARCH_LIST``: architectures such as ``8.0;9.0``; default those of the devices that are there.
- ``UNLEARN_EXT_CUDA=1``: build and load at once, also where no device is.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from .recipes import Recipe, find_csrc, torch_flags
from .toolchain import BuildError, ToolchainError, ask, find_compiler, host_compiler, macros

__all__ = ["architectures", "cuda_loop_recipe", "cuda_recipe", "find_nvcc", "nvcc_command"]

_LARGEST_SOURCE = "cuda/step.cu"
# Ampere and Hopper, where neither a device nor the environment names one.
_DEFAULT_ARCHITECTURES = ("80", "90")


def find_nvcc() -> str:
    """The compiler's path.

    Raises:
        ToolchainError: there is none; the message names the package to install.
    """
    places = [Path(home, "bin") for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    places += [Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
    nvidia = importlib.util.find_spec("nvidia")  # the namespace of NVIDIA's pip packages
    for root in list(nvidia.submodule_search_locations or ()) if nvidia else []:
        places += sorted(Path(root).glob("cu*/bin"), reverse=True)  # cu13/bin; cuda_nvcc/bin up to CUDA 12
    places.append(Path("/usr/local/cuda/bin"))
    for place in places:
        if path := shutil.which("nvcc", path=str(place)):
            return path
    raise ToolchainError(f"nvcc was not found: {_install()}, or let CUDA_HOME name a toolkit")


def _install() -> str:
    """nvcc and headers of torch's own version: NVIDIA's packages refuse to work with those of another."""
    return f'`pip install "cuda-toolkit[nvcc,cccl]=={torch.version.cuda or "13.0"}.*"`'


def architectures() -> tuple[str, ...]:
    """Compute capabilities to compile for, as ``90`` or, with intermediate code for later devices, ``90+PTX``."""
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        found = [entry.strip() for entry in re.split(r"[;, ]+", listed) if entry.strip()]
        for entry in found:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry):
                raise ToolchainError(f"TORCH_CUDA_ARCH_LIST has {entry!r}: expected numbers such as 8.0;9.0")
        return tuple(dict.fromkeys(entry.replace(".", "", 1) for entry in found))
    if torch.cuda.is_available():
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return tuple(f"{major}{minor}" for major, minor in sorted(capabilities))
    return _DEFAULT_ARCHITECTURES


def _generate(architecture: str) -> list[str]:
    number, plus, _ = architecture.partition("+")
    codes = [f"sm_{number}", *([f"compute_{number}"] if plus else [])]
    return ["-gencode", f"arch=compute_{number},code=[{','.join(codes)}]"]


def nvcc_command(chosen: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The compiler with its host compiler, and the flags that make the library what it is."""
    host = host_compiler(find_compiler())
    macros((host,), [])  # a host compiler that is none gives many lines of other things from nvcc
    compiler = (find_nvcc(), "-ccbin", host)
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA", *torch_flags()]
    for architecture in chosen:
        flags += _generate(architecture)
    return compiler, tuple(flags)


def cuda_recipe(csrc: Path | None = None) -> Recipe:
    """The CUDA operators and the checks they share with the CPU's.

    Raises:
        ToolchainError: no nvcc or no host compiler, or an architecture that is none.
        BuildError: this torch has no CUDA.
    """
    if torch.version.cuda is None:
        advice = "install a CUDA build of torch, or leave UNLEARN_EXT_CUDA unset"
        raise BuildError(f"torch {torch.__version__} is built without CUDA: {advice}")
    csrc = csrc or find_csrc()
    kernels = sorted((csrc / "cuda").glob("*.cu"), key=lambda path: path.name != Path(_LARGEST_SOURCE).name)
    shared = sorted(path for room in ("operators", "tensors") for path in (csrc / room).glob("*.cpp"))
    if not kernels:
        raise BuildError(f"the CUDA sources in {csrc} are missing: install unlearn_ext again")
    chosen = architectures()
    compiler, flags = nvcc_command(chosen)
    root = Path(torch.__file__).parent
    return Recipe(
        file_name="libunlearn_ext-cuda.so",
        csrc=csrc,
        sources=tuple(path.relative_to(csrc).as_posix() for path in (*kernels, *shared)),
        compiler=compiler,
        flags=flags,
        link_flags=("-shared", "-cudart", _runtime(compiler[0])),
        includes=(str(root / "include"), *_toolkit_includes(compiler[0])),
        libraries=(f"-L{root / 'lib'}", "-ltorch_cuda", "-ltorch_cpu", "-lc10", *_toolkit_libraries(compiler[0])),
        prefix=re.sub(r"[^\w.+-]", "_", f"torch{torch.__version__}-sm{'-'.join(chosen)}"),
        identity={
            "torch": f"{torch.__version__} {torch.version.git_version}",
            "nvcc": ask([compiler[0], "--version"]),
            "compiler": ask([compiler[2], "-v"]),
        },
    )


def cuda_loop_recipe(csrc: Path | None = None) -> Recipe:
    """``csrc/benchmark/loop.cu``: what the memory allows, compiled as the operators are. For measurements only."""
    sources = ("benchmark/loop.cu", "tensors/operands.cpp")
    return replace(cuda_recipe(csrc), file_name="libunlearn_ext_bench-cuda.so", sources=sources)


def _toolkit_roots(nvcc: str) -> list[Path]:
    """Where headers and libraries may lie: under nvcc's own root or, in pip's packages up to CUDA 12, beside it."""
    # Asked of nvcc itself: what is called so may be a script that starts it from elsewhere.
    found = re.search(r"^#\$ TOP=(.*)$", ask([nvcc, "--dryrun", "-c", "none.cu"]), re.MULTILINE)
    root = Path(found.group(1) if found else Path(nvcc).parent.parent).resolve()
    return [root, *(path for name in ("cuda_runtime", "cuda_cccl") if (path := root.parent / name).is_dir())]


def _toolkit_includes(nvcc: str) -> tuple[str, ...]:
    """Headers that the nvcc of pip's packages does not find by itself."""
    roots = [root / part for root in _toolkit_roots(nvcc) for part in ("include", "include/cccl")]
    for header in ("cuda_runtime.h", "nv/target"):
        if not any((root / header).is_file() for root in roots):
            raise ToolchainError(f"the CUDA toolkit of {nvcc} lacks {header}: {_install()}")
    return tuple(str(root) for root in roots if root.is_dir())


def _toolkit_libraries(nvcc: str) -> tuple[str, ...]:
    paths = (root / name for root in _toolkit_roots(nvcc) for name in ("lib", "lib64"))
    return tuple(f"-L{path}" for path in paths if path.is_dir())


def _runtime(nvcc: str) -> str:
    static = (root.glob("**/libcudart_static.a") for root in _toolkit_roots(nvcc))
    return "static" if any(any(found) for found in static) else "shared"
