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
  ``~/.cache/unlearn_ext``. One that others can write to is not used: see :mod:`unlearn_ext._library_cache`.
- ``UNLEARN_EXT_CXXFLAGS``: further flags for compiling and linking (``-fsanitize=address``); forces a build.
- ``UNLEARN_EXT_BUILD_TIMEOUT``: seconds after which a compiler that hangs is ended, default 1800.
- ``UNLEARN_EXT_LOCK_TIMEOUT``: seconds to wait for another process's build before building too, default 300.
- ``UNLEARN_EXT_QUIET``: ``1`` drops the progress lines on stderr.
- ``UNLEARN_EXT_CUDA``, ``CUDA_HOME``, ``TORCH_CUDA_ARCH_LIST``: see :mod:`unlearn_ext._cuda`.
- ``CXX``: the compiler. ``MAX_JOBS``: how many run at once, default one for every core.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import torch

from . import _library_cache, _toolchain
from ._library_cache import MISSING, CacheDirectory, UnusableError
from ._toolchain import BuildError, ToolchainError
from ._toolchain import ask as _run
from ._toolchain import find_compiler as _find_compiler
from ._toolchain import find_ninja as _find_ninja
from ._toolchain import say as _say
from .errors import InputError

__all__ = ["BuildError", "ToolchainError", "backend", "build", "build_reference", "library_path", "load", "load_cuda"]

# The oldest torch whose stable ABI the library needs: major, minor, patch and so on in one byte each (2.11).
_TORCH_TARGET = "0x020b000000000000"
_HERE = Path(__file__).resolve().parent
_LARGEST_SOURCE = "cpu/step.cpp"  # takes as long to compile as all other CPU sources together

# Ahead-of-time variants, best first: torch's name for what a processor offers, and the target within it.
_X86_VARIANTS = {"AVX512": "-march=x86-64-v4", "AVX2": "-march=x86-64-v3", "DEFAULT": "-march=x86-64-v2"}


# --- Loading ------------------------------------------------------------------------------------------------

_load_lock = threading.RLock()
_backend: str | None = None
_cuda_backend: str | None = None
_library: Path | None = None
_directories: dict[Path, CacheDirectory] = {}  # of the libraries whose hash this process has checked


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
    from ._cuda import cuda_recipe

    forced = os.environ.get("UNLEARN_EXT_BACKEND", "")
    if forced == "python":
        return None
    try:
        return _build_cached(cuda_recipe(), None)
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
        raise _not_loaded(path, error) from error
    torch.ops.loaded_libraries.add(str(path))


def _not_loaded(path: Path, error: Exception) -> BuildError:
    hint = ""
    if "failed to map segment" in str(error) or "not permitted" in str(error):
        hint = " (programs and libraries may not run from there: a file system mounted noexec, or a security policy)"
    if path.parent == _HERE / "_lib":
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
    candidates = (_HERE / "_lib" / _variant_file(name) for name in names[best:])
    return next((path for path in candidates if path.is_file()), None)


# --- What to build ------------------------------------------------------------------------------------------


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
    csrc = csrc or _find_csrc()
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
        csrc or _find_csrc(),
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
    compiler = _find_compiler()
    extra = _toolchain.split_words("UNLEARN_EXT_CXXFLAGS", os.environ.get("UNLEARN_EXT_CXXFLAGS", ""))
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
            "compiler": _run([*compiler, "-v"]),
            "target": macros,  # what -march=native means here: one home directory may serve many processors
            **(identity or {}),
        },
    )


def torch_flags() -> list[str]:
    """Every library is for the stable ABI of the oldest torch that is supported."""
    return [f"-DTORCH_TARGET_VERSION={_TORCH_TARGET}"]


def _find_csrc() -> Path:
    """Inside the package when a wheel was installed, beside it in a checkout."""
    if not _HERE.is_dir():
        raise ToolchainError(f"unlearn_ext is imported from inside an archive ({_HERE}), which compilers cannot read")
    for csrc in (_HERE / "csrc", _HERE.parent / "csrc"):
        if (csrc / "math").is_dir():
            return csrc
    raise BuildError(f"no C++ sources in {_HERE} or {_HERE.parent}: install unlearn_ext again")


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
            return candidate, _toolchain.macros(compiler, candidate)
        except _toolchain.CompilerHangsError:
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


# --- Building -----------------------------------------------------------------------------------------------


def build(csrc: Path | None = None, cache: Path | None = None) -> Path:
    """Build the CPU library unless the cache has it, and return its path.

    Args:
        csrc: the sources; default the package's own.
        cache: where libraries are kept; default as the module says.

    Raises:
        ToolchainError: no compiler or no ninja.
        BuildError: the sources do not compile or link.
    """
    return _build_cached(cpu_recipe(csrc), cache)


@functools.cache
def load_loop() -> None:
    """Build ``csrc/benchmark/loop.cpp`` unless the cache has it, and load it: the kernels of ``unlearn_ext_bench``."""
    _load_library(_build_cached(loop_recipe(), None))


@functools.cache
def load_cuda_loop() -> None:
    """The same for ``csrc/benchmark/loop.cu``."""
    from ._cuda import cuda_loop_recipe

    _load_library(_build_cached(cuda_loop_recipe(), None))


@functools.cache
def build_reference(csrc: Path | None = None, cache: Path | None = None) -> ModuleType:
    """Build ``csrc/reference.cpp`` unless the cache has it, and import it (needs the ``test`` extra)."""
    path = _build_cached(reference_recipe(csrc), cache)
    directory = _directories.get(path)
    place = str(path) if directory is None else directory.loadable(path.name)
    loader = importlib.machinery.ExtensionFileLoader("reference", place)
    spec = importlib.machinery.ModuleSpec("reference", loader, origin=str(path))
    try:
        module = importlib.util.module_from_spec(spec)
    except ImportError as error:
        raise _not_loaded(path, error) from error
    loader.exec_module(module)
    return module


def _build_cached(recipe: Recipe, cache: Path | None) -> Path:
    """The library from the cache, put there first if need be.

    The library appears under its name complete, by a rename, or not at all: whoever sees it may load it. The
    lock only saves work. Where it fails (a file system without locks, a holder that hangs) two processes
    build the same thing in directories of their own, and the later rename replaces like by like.
    """
    root = cache or _default_cache()
    if root is None:
        return _build_apart(recipe, "there is no home directory for a cache")
    try:
        directory = CacheDirectory.open(root, recipe.key, create=False)
        if directory is None or directory.fault(recipe.file_name):
            _find_ninja()  # before anything is created
            directory = directory or CacheDirectory.open(root, recipe.key, create=True)
            if directory is None:
                raise UnusableError(f"{root / recipe.key} was removed while it was made")
            _build_into(directory, recipe)
    except UnusableError as error:
        return _build_apart(recipe, str(error))
    library = directory.path / recipe.file_name
    _directories[library] = directory
    return library


def _build_into(directory: CacheDirectory, recipe: Recipe) -> None:
    """Build what is missing there, or not what was built there.

    Raises:
        UnusableError: nothing can be written there.
    """
    path, name = directory.path, recipe.file_name
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UnusableError(f"cannot write to {path} ({error.strerror or error})") from None
    with _lock(path / "lock", lambda: directory.fault(name) is None):
        if fault := directory.fault(name):
            if fault != MISSING:
                _say(f"{path / name} {fault}; it is replaced")
            _sweep(path)
            compile_recipe(recipe, path / name)
            if fault := directory.fault(name):  # by another process that has the cache's owner and its name
                raise UnusableError(f"{path / name}, built just now, {fault}")


def _build_apart(recipe: Recipe, reason: str) -> Path:
    """Build for this process alone. The directory goes when the process ends; after a failure it stays."""
    advice = "let UNLEARN_EXT_CACHE name a directory of your own"
    try:
        directory = Path(tempfile.mkdtemp(prefix="unlearn_ext-"))
        noexec = _library_cache.is_noexec(str(directory))
    except OSError as error:
        missing = f"there is no temporary directory ({error.strerror or error})"
        raise BuildError(f"{reason}, and {missing}: {advice}") from None
    if noexec:
        os.rmdir(directory)
        raise BuildError(f"{reason}, and {directory.parent} is on a file system mounted noexec: {advice}")
    _say(f"{reason}: building in {directory}, for this process only; {advice}")
    library = compile_recipe(recipe, directory / recipe.file_name)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return library


def compile_recipe(recipe: Recipe, library: Path) -> Path:
    """Compile into a private directory beside ``library``, then move the result to that name in one step.

    ``build.log`` beside it keeps what the compiler said, and a file with its hash lies beside it too.
    """
    started = time.monotonic()
    ninja = [_find_ninja(), "-j", str(_toolchain.jobs())]
    _say(f"building {recipe.file_name} with {recipe.compiler[0]} ...")
    try:
        with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent, ignore_cleanup_errors=True) as name:
            work = Path(name)
            _run_ninja(ninja, recipe, work, library.with_name("build.log"))
            _library_cache.put(work / recipe.file_name, library)
    except OSError as error:  # a full disk, say
        what = f"cannot build in {library.parent}: {error.strerror or error}"
        raise BuildError(f"{what}; UNLEARN_EXT_CACHE names another directory") from error
    _say(f"built in {time.monotonic() - started:.1f} s: {library}")
    return library


def _run_ninja(ninja: list[str], recipe: Recipe, work: Path, log: Path) -> None:
    (work / "csrc").symlink_to(recipe.csrc.absolute())
    (work / _others(recipe)).write_text("".join(f'#include "{source}"\n' for source in recipe.sources[1:]))
    (work / "build.ninja").write_bytes(os.fsencode(_ninja_script(recipe)))
    limit = _toolchain.build_timeout()
    hung = False
    with open(work / log.name, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as output:
        try:
            status, _, _ = _toolchain.start(ninja, limit, cwd=work, stdout=output, stderr=subprocess.STDOUT)
        except subprocess.TimeoutExpired:
            hung = True
    _library_cache.replace(work / log.name, log)
    if hung:
        advice = "UNLEARN_EXT_BUILD_TIMEOUT gives it longer, CXX names another"
        raise BuildError(f"{recipe.compiler[0]} was ended after {limit:g} s without a library: {advice}; log: {log}")
    if status != 0:
        errors = _toolchain.errors_in(log.read_text(encoding="utf-8", errors="replace"))
        said = f"{errors}\nfull log: {log}{_toolchain.variables_in_play()}"
        raise BuildError(f"the native library does not compile:\n{said}")
    if not (work / recipe.file_name).is_file():
        raise BuildError(f"{recipe.compiler[0]} says that it has built the library, and has not; full log: {log}")


def _ninja_script(recipe: Recipe) -> str:
    """A build from nothing: no dependency files, because nothing is ever rebuilt there.

    It runs in the work directory, where ``csrc`` is a link to the sources. Names relative to it keep every character of
    users' paths away from ninja, from shells, and from nvcc, which hands paths to a shell without quoting them.
    """

    def command(*words: str) -> str:
        return shlex.join(words).replace("$", "$$")

    includes = ["-Icsrc", *(word for directory in recipe.includes for word in ("-isystem", directory))]
    units = _translation_units(recipe)
    objects = [f"{number}.o" for number in range(len(units))]
    link = (*recipe.link_flags, *recipe.libraries)
    lines = [
        "rule compile",
        f"  command = {command(*recipe.compiler, *recipe.flags, *includes)} -c $in -o $out",
        "rule link",
        f"  command = {command(*recipe.compiler)} $in {command(*link)} -o $out",
        *(f"unit{number} = {unit}".replace("$", "$$") for number, unit in enumerate(units)),
        *(f"build {target}: compile $unit{number}" for number, target in enumerate(objects)),
        f"build {recipe.file_name}: link {' '.join(objects)}",
    ]
    return "\n".join(lines) + "\n"


def _translation_units(recipe: Recipe) -> list[str]:
    """The first source, and all others together: every unit pays two seconds for PyTorch's headers."""
    first, *others = recipe.sources
    return [os.path.join("csrc", first), *([_others(recipe)] if others else [])]


def _others(recipe: Recipe) -> str:
    return f"others{Path(recipe.sources[0]).suffix}"


@contextlib.contextmanager
def _lock(path: Path, done: Callable[[], bool]) -> Iterator[None]:
    """Let one builder at a time hold ``path``; stop waiting as soon as ``done()``, or after the timeout.

    The kernel releases the lock when its holder ends, however it ends, so the file it leaves means nothing.
    """
    import fcntl  # not on Windows, where nothing gets here

    timeout = _toolchain.seconds_setting("UNLEARN_EXT_LOCK_TIMEOUT", 300.0)
    deadline = time.monotonic() + timeout
    waiting = False
    with contextlib.ExitStack() as stack:
        file = None
        while not done():
            try:
                if file is None:
                    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW, 0o600)
                    stack.callback(os.close, file)
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    _say(f"another process has held {path} for {timeout:g} s: building without it")
                    break
                if not waiting:
                    _say("waiting for another process that builds the same library ...")
                waiting = True
                time.sleep(0.05)
            except OSError:  # a file system without locks, or a lock that belongs to another user
                break
        yield


def _sweep(directory: Path) -> None:
    """Remove what builders that were killed left behind: what is older than a living one can be."""
    limit = max(3600.0, 2 * _toolchain.build_timeout())
    for path in directory.glob("build-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > limit:
                shutil.rmtree(path)


def _default_cache() -> Path | None:
    """The cache directory, ``None`` where there is none: a container's user whom no password file lists."""
    if chosen := os.environ.get("UNLEARN_EXT_CACHE"):
        try:
            return Path(chosen).expanduser()
        except RuntimeError:
            raise InputError(f"UNLEARN_EXT_CACHE is {chosen!r}, and there is no such home directory") from None
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # its specification says to take no notice of others
        return Path(base, "unlearn_ext")
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ".cache" / "unlearn_ext" if home.is_absolute() and os.environ.get("HOME") != "" else None
