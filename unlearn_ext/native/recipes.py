"""What to build: sources, compiler, flags, and the key that names a library in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import sysconfig
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from . import toolchain
from .toolchain import BuildError, ToolchainError, ask, find_compiler

__all__ = ["Recipe", "aot_recipes", "cpu_recipe", "find_csrc", "loop_recipe", "reference_recipe", "torch_flags"]

# The oldest torch whose stable ABI the library needs: major, minor, patch and so on in one byte each (2.11).
_TORCH_TARGET = "0x020b000000000000"
_PACKAGE = Path(__file__).resolve().parents[1]
_LARGEST_SOURCE = "cpu/step.cpp"  # takes as long to compile as all other CPU sources together
# Ahead-of-time variants, best first: torch's name for what a processor offers, and the target within it.
_X86_VARIANTS = {"AVX512": "-march=x86-64-v4", "AVX2": "-march=x86-64-v3", "DEFAULT": "-march=x86-64-v2"}


@dataclass(frozen=True)
class Recipe:
    """One shared library: what goes into it, and the key that names it.

    ``sources`` are relative to ``csrc``, so that neither the key nor the library depends on where that is; the first
    takes the longest to compile. ``includes`` and ``libraries`` are outside the key: ``identity`` tells what they hold.
    """

    file_name: str
    csrc: Path
    sources: tuple[str, ...]
    compiler: tuple[str, ...]
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    includes: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    prefix: str = ""
    identity: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """``prefix-hash``. Every input that can change the machine code changes the hash.

        Headers count whether or not they are included: reading them all is quicker than asking the compiler.
        """
        digest = hashlib.sha256()
        parts = [self.file_name, self.compiler, self.flags, self.link_flags, self.identity]
        digest.update(json.dumps(parts, sort_keys=True).encode())
        headers = (
            path.relative_to(self.csrc).as_posix() for suffix in ("h", "cuh") for path in self.csrc.rglob(f"*.{suffix}")
        )
        for name in (*self.sources, *sorted(headers)):
            content = (self.csrc / name).read_bytes()
            digest.update(f"\0{name}\0{len(content)}\0".encode() + content)
        return f"{self.prefix}-{digest.hexdigest()[:16]}"


def cpu_recipe(csrc: Path | None = None, target: str = "-march=native", file_name: str = "") -> Recipe:
    """The CPU operators: ``csrc/cpu`` and what it shares with other backends, compiled for ``target``."""
    csrc = csrc or find_csrc()
    sources = [path for room in ("cpu", "operators", "tensors") for path in sorted((csrc / room).glob("*.cpp"))]
    sources.sort(key=lambda path: path != csrc / _LARGEST_SOURCE)
    torch_root = Path(torch.__file__).parent
    return _recipe(
        csrc,
        [path.relative_to(csrc).as_posix() for path in sources],
        file_name or _variant_file("native"),
        target,
        includes=(str(torch_root / "include"),),
        # torch is in the process before the library is, so the loader finds these by name: no rpath.
        libraries=(f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10"),
    )


def reference_recipe(csrc: Path | None = None) -> Recipe:
    """``csrc/reference.cpp``: the mathematics in float64 as a Python module, for tests and notebooks."""
    try:
        import pybind11
    except ModuleNotFoundError:
        raise ToolchainError("pybind11 is not installed: `pip install 'unlearn_ext[test]'`") from None
    return _recipe(
        csrc or find_csrc(),
        ["reference.cpp"],
        "reference" + sysconfig.get_config_var("EXT_SUFFIX"),
        "-march=native",
        includes=(pybind11.get_include(), sysconfig.get_path("include")),
        identity={"pybind11": pybind11.__version__, "python": sys.version},
    )


def loop_recipe(csrc: Path | None = None) -> Recipe:
    """``csrc/benchmark/loop.cpp``: what the memory allows, compiled as the operators are. For measurements only."""
    operators = cpu_recipe(csrc)
    return replace(operators, file_name="libunlearn_ext_bench.so", sources=("benchmark/loop.cpp",))


def aot_recipes() -> list[Recipe]:
    """What an ahead-of-time wheel carries: one library for each instruction set that torch tells apart."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    variants = _X86_VARIANTS if x86 else {"DEFAULT": ""}
    return [cpu_recipe(target=target, file_name=_variant_file(name)) for name, target in variants.items()]


def _recipe(
    csrc: Path,
    sources: list[str],
    file_name: str,
    target: str,
    *,
    includes: tuple[str, ...],
    libraries: tuple[str, ...] = (),
    identity: dict[str, str] | None = None,
) -> Recipe:
    if not sources or not all((csrc / name).is_file() for name in sources):
        raise BuildError(f"the C++ sources in {csrc} are incomplete: install unlearn_ext again")
    compiler = find_compiler()
    extra = toolchain.split_words("UNLEARN_EXT_CXXFLAGS", os.environ.get("UNLEARN_EXT_CXXFLAGS", ""))
    # -fno-math-errno lets sqrt vectorise. Nothing else of the -ffast-math family: results keep IEEE's rules.
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-fvisibility=hidden"]
    flags += torch_flags()
    flags, macros = _settle_target(compiler, flags, target, extra)
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    return Recipe(
        file_name=file_name,
        csrc=csrc,
        sources=tuple(sources),
        compiler=compiler,
        flags=tuple(flags),
        link_flags=("-shared", *undefined, *extra),
        includes=includes,
        libraries=libraries,
        prefix=_readable_prefix(macros),
        identity={
            "torch": f"{torch.__version__} {torch.version.git_version}",
            "compiler": ask([*compiler, "-v"]),
            "target": macros,  # what -march=native means here: one home directory may serve many processors
            **(identity or {}),
        },
    )


def torch_flags() -> list[str]:
    """Every library is for the stable ABI of the oldest torch that is supported."""
    return [f"-DTORCH_TARGET_VERSION={_TORCH_TARGET}"]


def find_csrc() -> Path:
    """Inside the package when a wheel was installed, beside it in a checkout."""
    if not _PACKAGE.is_dir():
        raise ToolchainError(
            f"unlearn_ext is imported from inside an archive ({_PACKAGE}), which compilers cannot read"
        )
    for csrc in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (csrc / "math").is_dir():
            return csrc
    raise BuildError(f"no C++ sources in {_PACKAGE} or {_PACKAGE.parent}: install unlearn_ext again")


def _settle_target(compiler: tuple[str, ...], flags: list[str], target: str, extra: list[str]) -> tuple[list[str], str]:
    """All flags, with the first spelling of the target that the compiler takes, and the macros they define.

    512-bit vectors must be asked for: compilers keep to 256 bits, for the sake of processors that slow down,
    and a kernel that streams memory does not notice that slowing.
    """
    spellings = [[target, "-mprefer-vector-width=512"], [target]]
    if target == "-march=native":
        spellings += [["-mcpu=native"], []]
    for spelling in spellings:
        candidate = [*flags, *filter(None, spelling), *extra]
        try:
            return candidate, toolchain.macros(compiler, candidate)
        except toolchain.CompilerHangsError:
            raise
        except BuildError as error:
            refusal = error
    raise refusal


def _readable_prefix(macros: str) -> str:
    compiler = "cxx"
    for name, macro in (("clang", "__clang_major__"), ("gcc", "__GNUC__")):  # clang defines both
        if found := re.search(rf"^#define {macro} (\d+)$", macros, re.MULTILINE):
            compiler = name + found.group(1)
            break
    return re.sub(r"[^\w.+-]", "_", f"torch{torch.__version__}-{compiler}-{platform.machine()}")


def _variant_file(name: str) -> str:
    return f"libunlearn_ext-{name.lower()}.so"
