"""Builds a recipe's library into the cache, once for all processes that start meanwhile."""

from __future__ import annotations

import atexit
import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import InputError
from . import library_cache, toolchain
from .library_cache import MISSING, CacheDirectory, UnusableError
from .recipes import Recipe, cpu_recipe
from .toolchain import BuildError, find_ninja, say

__all__ = ["build", "build_cached", "cache_directory", "compile_recipe"]

_directories: dict[Path, CacheDirectory] = {}  # of the libraries whose hash this process has checked


def build(csrc: Path | None = None, cache: Path | None = None) -> Path:
    """Build the CPU library unless the cache has it, and return its path.

    Args:
        csrc: the sources; default the package's own.
        cache: where libraries are kept; default as the module says.

    Raises:
        ToolchainError: no compiler or no ninja.
        BuildError: the sources do not compile or link.
    """
    return build_cached(cpu_recipe(csrc), cache)


def build_cached(recipe: Recipe, cache: Path | None) -> Path:
    """The library from the cache, put there first if need be.

    The library appears under its name complete, by a rename, or not at all: whoever sees it may load it. The
    lock only saves work. Where it fails (a file system without locks, a holder that hangs) two processes
    build the same thing in directories of their own, and the later rename replaces like by like.
    """
    root = cache or cache_directory()
    if root is None:
        return _build_apart(recipe, "there is no home directory for a cache")
    try:
        directory = CacheDirectory.open(root, recipe.key, create=False)
        if directory is None or directory.fault(recipe.file_name):
            find_ninja()  # before anything is created
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
                say(f"{path / name} {fault}; it is replaced")
            _sweep(path)
            compile_recipe(recipe, path / name)
            if fault := directory.fault(name):  # by another process that has the cache's owner and its name
                raise UnusableError(f"{path / name}, built just now, {fault}")


def _build_apart(recipe: Recipe, reason: str) -> Path:
    """Build for this process alone. The directory goes when the process ends; after a failure it stays."""
    advice = "let UNLEARN_EXT_CACHE name a directory of your own"
    try:
        directory = Path(tempfile.mkdtemp(prefix="unlearn_ext-"))
        noexec = library_cache.is_noexec(str(directory))
    except OSError as error:
        missing = f"there is no temporary directory ({error.strerror or error})"
        raise BuildError(f"{reason}, and {missing}: {advice}") from None
    if noexec:
        os.rmdir(directory)
        raise BuildError(f"{reason}, and {directory.parent} is on a file system mounted noexec: {advice}")
    say(f"{reason}: building in {directory}, for this process only; {advice}")
    library = compile_recipe(recipe, directory / recipe.file_name)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return library


def compile_recipe(recipe: Recipe, library: Path) -> Path:
    """Compile into a private directory beside ``library``, then move the result to that name in one step.

    ``build.log`` beside it keeps what the compiler said, and a file with its hash lies beside it too.
    """
    started = time.monotonic()
    ninja = [find_ninja(), "-j", str(toolchain.jobs())]
    say(f"building {recipe.file_name} with {recipe.compiler[0]} ...")
    try:
        with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent, ignore_cleanup_errors=True) as name:
            work = Path(name)
            _run_ninja(ninja, recipe, work, library.with_name("build.log"))
            library_cache.put(work / recipe.file_name, library)
    except OSError as error:  # a full disk, say
        what = f"cannot build in {library.parent}: {error.strerror or error}"
        raise BuildError(f"{what}; UNLEARN_EXT_CACHE names another directory") from error
    say(f"built in {time.monotonic() - started:.1f} s: {library}")
    return library


def _run_ninja(ninja: list[str], recipe: Recipe, work: Path, log: Path) -> None:
    (work / "csrc").symlink_to(recipe.csrc.absolute())
    (work / _others(recipe)).write_text("".join(f'#include "{source}"\n' for source in recipe.sources[1:]))
    (work / "build.ninja").write_bytes(os.fsencode(_ninja_script(recipe)))
    limit = toolchain.build_timeout()
    hung = False
    with open(work / log.name, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as output:
        try:
            status, _, _ = toolchain.start(ninja, limit, cwd=work, stdout=output, stderr=subprocess.STDOUT)
        except subprocess.TimeoutExpired:
            hung = True
    library_cache.replace(work / log.name, log)
    if hung:
        advice = "UNLEARN_EXT_BUILD_TIMEOUT gives it longer, CXX names another"
        raise BuildError(f"{recipe.compiler[0]} was ended after {limit:g} s without a library: {advice}; log: {log}")
    if status != 0:
        errors = toolchain.errors_in(log.read_text(encoding="utf-8", errors="replace"))
        said = f"{errors}\nfull log: {log}{toolchain.variables_in_play()}"
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

    timeout = toolchain.seconds_setting("UNLEARN_EXT_LOCK_TIMEOUT", 300.0)
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
                    say(f"another process has held {path} for {timeout:g} s: building without it")
                    break
                if not waiting:
                    say("waiting for another process that builds the same library ...")
                waiting = True
                time.sleep(0.05)
            except OSError:  # a file system without locks, or a lock that belongs to another user
                break
        yield


def _sweep(directory: Path) -> None:
    """Remove what builders that were killed left behind: what is older than a living one can be."""
    limit = max(3600.0, 2 * toolchain.build_timeout())
    for path in directory.glob("build-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > limit:
                shutil.rmtree(path)


def cache_directory() -> Path | None:
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
