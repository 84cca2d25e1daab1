"""Find, build and load the native library.

The library holds kernels only, behind PyTorch's stable ABI, and knows nothing of Python: one build serves
every Python version and every later torch. The operators' schemas are in :mod:`unlearn_ext.ops`, which calls
:func:`load` when the first operator runs. Importing this module starts no process and compiles nothing.

:func:`load` takes the first of these that applies:

1. ``UNLEARN_EXT_BACKEND=python``: no library, the pure-PyTorch operators run;
2. a library that an ahead-of-time wheel carries (``unlearn_ext/_lib``), the best this processor can execute;
3. a library built here before, from the cache directory;
4. a build with ninja and the C++ compiler, into that directory, shared by all processes that start meanwhile;
5. without compiler or ninja: the pure-PyTorch operators and one warning. ``UNLEARN_EXT_BACKEND=native`` makes
   that an error. A compiler that is there and fails is always an error.

Environment:

- ``UNLEARN_EXT_BACKEND``: ``native`` or ``python`` forces one; unset chooses as above.
- ``UNLEARN_EXT_CACHE``: the cache directory, default ``$XDG_CACHE_HOME/unlearn_ext``, else
  ``~/.cache/unlearn_ext``. One that others can write to is not used: see :mod:`unlearn_ext.native.library_cache`.
- ``UNLEARN_EXT_CXXFLAGS``: further flags for compiling and linking (``-fsanitize=address``); forces a build.
- ``UNLEARN_EXT_BUILD_TIMEOUT``: seconds after which a compiler that hangs is ended, default 1800.
- ``UNLEARN_EXT_LOCK_TIMEOUT``: seconds to wait for another process's build before building too, default 300.
- ``UNLEARN_EXT_QUIET``: ``1`` drops the progress lines on stderr.
- ``UNLEARN_EXT_CUDA``, ``CUDA_HOME``, ``TORCH_CUDA_ARCH_LIST``: see :mod:`unlearn_ext.native.cuda`.
- ``CXX``: the compiler. ``MAX_JOBS``: how many run at once, default one for every core.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import os
import struct
import threading
import warnings
from pathlib import Path
from types import ModuleType

import torch

from ..errors import InputError
from .building import _directories, build, build_cached
from .recipes import _PACKAGE, _X86_VARIANTS, _variant_file, loop_recipe, reference_recipe
from .toolchain import BuildError, ToolchainError

__all__ = ["BuildError", "ToolchainError", "backend", "build_reference", "library_path", "load", "load_cuda"]


# --- Loading ------------------------------------------------------------------------------------------------

_load_lock = threading.RLock()
_backend: str | None = None
_cuda_backend: str | None = None
_library: Path | None = None


def backend() -> str:
    """Which operators run: ``"native"`` or ``"python"``. Loads the library if that has not happened yet."""
    return load()


def library_path() -> Path | None:
    """The file that was loaded, or None when nothing was (yet) or the pure-PyTorch operators run."""
    return _library


def load() -> str:
    """Load the native library once, building it if needed, and return ``"native"`` or ``"python"``.

    Safe to call from several threads and processes at once, and cheap after the first call.

    Raises:
        InputError: ``UNLEARN_EXT_BACKEND`` is neither ``native`` nor ``python``.
        ToolchainError: ``UNLEARN_EXT_BACKEND=native`` and no compiler or no ninja.
        BuildError: the sources do not compile, or the library does not load.
    """
    global _backend, _library
    if _backend is None:
        with _load_lock:
            if _backend is None:
                _library = _find_or_build()
                if _library is not None:
                    _load_library(_library)
                # Last, because other threads read it without the lock.
                _backend = "python" if _library is None else "native"
    if os.environ.get("UNLEARN_EXT_CUDA") == "1":
        load_cuda()
    return _backend


def load_cuda() -> str:
    """Load the CUDA kernels once, building them if needed, and return ``"native"`` or ``"python"``.

    Without nvcc CUDA tensors take the pure-PyTorch operators, after one warning that names what to install; with
    ``UNLEARN_EXT_BACKEND=native`` or ``UNLEARN_EXT_CUDA=1`` that is an error.

    Raises:
        ToolchainError, BuildError: as for :func:`load`.
    """
    global _cuda_backend
    if _cuda_backend is None:
        with _load_lock:
            if _cuda_backend is None:
                library = _find_or_build_cuda()
                if library is not None:
                    _load_library(library)
                _cuda_backend = "python" if library is None else "native"
    return _cuda_backend


def _find_or_build_cuda() -> Path | None:
    from .cuda import cuda_recipe

    forced = os.environ.get("UNLEARN_EXT_BACKEND", "")
    if forced == "python":
        return None
    try:
        return build_cached(cuda_recipe(), None)
    except ToolchainError as error:
        if forced == "native" or os.environ.get("UNLEARN_EXT_CUDA") == "1":
            variable = "UNLEARN_EXT_BACKEND=native" if forced == "native" else "UNLEARN_EXT_CUDA=1"
            raise ToolchainError(f"{variable} asks for the CUDA kernels, but {error}") from None
        warnings.warn(
            f"unlearn_ext runs its slower pure-PyTorch operators on CUDA tensors, because {error}. "
            "UNLEARN_EXT_BACKEND=python chooses them without this warning.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def _find_or_build() -> Path | None:
    """The library to load, or None for the pure-PyTorch operators."""
    forced = os.environ.get("UNLEARN_EXT_BACKEND", "")
    if forced not in ("", "native", "python"):
        raise InputError(f"UNLEARN_EXT_BACKEND is {forced!r}: expected 'native', 'python' or nothing")
    if forced == "python":
        return None
    try:
        return _packaged_library() or build()
    except ToolchainError as error:
        if forced == "native":
            raise ToolchainError(f"UNLEARN_EXT_BACKEND=native, but {error}") from None
        warnings.warn(
            f"unlearn_ext runs its slower pure-PyTorch operators, because {error}. "
            "UNLEARN_EXT_BACKEND=python chooses them without this warning.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def _load_library(path: Path) -> None:
    """Load a library into the process: one of the cache from the directory in which its hash was checked."""
    directory = _directories.get(path)
    place = str(path) if directory is None else directory.loadable(path.name)
    try:
        if _is_cut(place):
            raise OSError("the file is cut short")
        ctypes.CDLL(place)  # torch.ops.load_library hides what the loader says, and follows links first
    except OSError as error:
        raise not_loaded(path, error) from error
    torch.ops.loaded_libraries.add(str(path))


def not_loaded(path: Path, error: Exception) -> BuildError:
    hint = ""
    if "failed to map segment" in str(error) or "not permitted" in str(error):
        hint = " (programs and libraries may not run from there: a file system mounted noexec, or a security policy)"
    if path.parent == _PACKAGE / "_lib":
        advice = "install unlearn_ext again"
    else:
        advice = "delete it to have it built anew, or let UNLEARN_EXT_CACHE name another directory"
    return BuildError(f"{path} does not load: {error}{hint}; {advice}")


def no_kernel(operator: str, device: str) -> BuildError:
    """The error of a library that was loaded and has no kernel for an operator: another one of that name."""
    library = _library if device == "cpu" else "the library that was loaded"
    advice = "it is another library, delete it or install unlearn_ext again"
    return BuildError(f"{library} has no {device} kernel for unlearn_ext::{operator}: {advice}")


def _is_cut(path: str) -> bool:
    """Whether an ELF file ends before its section headers, which come last.

    The loader maps such a file without a look at its size, and the process dies of SIGBUS.
    """
    with open(path, "rb") as file:
        head = file.read(64)
        if len(head) < 64 or head[:6] != b"\x7fELF\2\1":  # 64 bits, little endian
            return False
        (start,), (size, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
        return start + size * count > os.fstat(file.fileno()).st_size


def _packaged_library() -> Path | None:
    """The ahead-of-time library for this processor, if the installed wheel carries any."""
    if os.environ.get("UNLEARN_EXT_CXXFLAGS"):  # asks for a build of its own
        return None
    names = list(_X86_VARIANTS)
    capability = torch.backends.cpu.get_cpu_capability()
    best = names.index(capability) if capability in names else names.index("DEFAULT")
    candidates = (_PACKAGE / "_lib" / _variant_file(name) for name in names[best:])
    return next((path for path in candidates if path.is_file()), None)


# --- What to build ------------------------------------------------------------------------------------------


# --- Building -----------------------------------------------------------------------------------------------


@functools.cache
def load_loop() -> None:
    """Build ``csrc/benchmark/loop.cpp`` unless the cache has it, and load it: the kernels of ``unlearn_ext_bench``."""
    _load_library(build_cached(loop_recipe(), None))


@functools.cache
def load_cuda_loop() -> None:
    """The same for ``csrc/benchmark/loop.cu``."""
    from .cuda import cuda_loop_recipe

    _load_library(build_cached(cuda_loop_recipe(), None))


@functools.cache
def build_reference(csrc: Path | None = None, cache: Path | None = None) -> ModuleType:
    """Build ``csrc/reference.cpp`` unless the cache has it, and import it (needs the ``test`` extra)."""
    path = build_cached(reference_recipe(csrc), cache)
    directory = _directories.get(path)
    place = str(path) if directory is None else directory.loadable(path.name)
    loader = importlib.machinery.ExtensionFileLoader("reference", place)
    spec = importlib.machinery.ModuleSpec("reference", loader, origin=str(path))
    try:
        module = importlib.util.module_from_spec(spec)
    except ImportError as error:
        raise not_loaded(path, error) from error
    loader.exec_module(module)
    return module
