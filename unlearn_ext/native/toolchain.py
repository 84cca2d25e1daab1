"""The compiler and ninja: where they are, how they are started, and what is shown of what they say.

Nothing that is started here outlives its time: a compiler that hangs is ended with all that it started.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..errors import InputError

__all__ = ["BuildError", "ToolchainError"]

_QUESTION_SECONDS = 60.0  # for a compiler's version or macros
_ERROR_LINES = 5
_LAST_LINES = 10
_LONGEST_LINE = 300
_LAUNCHERS = ("ccache", "distcc", "icecc", "sccache")
# What compilers, linkers and the system say of what failed; not a warning that -Werror may turn into an error.
_ERROR = re.compile(
    r"\berror *(#\d+)?:|\bfatal\b|undefined reference|undefined symbol|cannot find -l|\bKilled\b"
    r"|No space left on device|out of memory|memory exhausted",
)


class BuildError(RuntimeError):
    """The library does not compile, link or load. The message has what the compiler or the loader said."""


class CompilerHangsError(BuildError):
    """It was ended: asking it anything else would take as long again."""


class ToolchainError(RuntimeError):
    """What a build needs is not installed: the one failure for which the pure-PyTorch operators stand in."""


# --- Finding ------------------------------------------------------------------------------------------------


def find_compiler() -> tuple[str, ...]:
    """``CXX``, which may hold a launcher or arguments, or the system's compiler."""
    install = "install one (`apt install g++`, `dnf install gcc-c++`, `conda install cxx-compiler`)"
    if sys.platform == "win32":
        raise ToolchainError("the native library is built on Linux and macOS only")
    text = os.environ.get("CXX", "").strip()
    if text:
        words = [text] if shutil.which(text) else split_words("CXX", text)  # a path may hold spaces
        if path := shutil.which(words[0]):
            return (os.path.abspath(path), *words[1:])
        what = "is not a program" if os.path.exists(words[0]) else "was not found"
        raise ToolchainError(f"the compiler in CXX, {words[0]!r}, {what}: correct it, or {install}")
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return (path,)
    raise ToolchainError(f"no C++ compiler was found: {install}, or let CXX name it")


def host_compiler(compiler: tuple[str, ...]) -> str:
    """The program itself, which is all that nvcc can start: without a launcher and without arguments."""
    for word in compiler:
        if Path(word).name not in _LAUNCHERS:
            return shutil.which(word) or word
    return compiler[0]


def find_ninja() -> str:
    """ninja from the PATH or, where an environment is used without activating it, from its package."""
    if path := shutil.which("ninja"):
        return path
    with contextlib.suppress(ImportError, FileNotFoundError):
        import ninja

        if path := shutil.which("ninja", path=ninja.BIN_DIR):
            return path
    raise ToolchainError("ninja was not found: `pip install ninja`")


def macros(compiler: tuple[str, ...], flags: list[str]) -> str:
    """What the compiler defines before a program's first line.

    Raises:
        ToolchainError: it is no C++ compiler: without any flags it does not do this either.
        BuildError: it refuses the flags.
    """
    question = ["-dM", "-E", "-x", "c++", os.devnull]
    try:
        answer = ask([*compiler, *flags, *question])
        said = "" if _defines_cplusplus(answer) else "it does not say which C++ it knows"
    except CompilerHangsError:
        raise
    except BuildError as error:
        if flags and _defines_cplusplus(_answer_or_nothing([*compiler, *question])):
            raise BuildError(f"{error}{variables_in_play()}") from None
        said = str(error).splitlines()[0]
    if said:
        named = f"CXX is {shlex.join(compiler)!r}, which" if os.environ.get("CXX") else f"{shlex.join(compiler)!r}"
        raise ToolchainError(f"{named} does not work as a C++ compiler ({said}): let CXX name one, or unset it")
    return answer


def _defines_cplusplus(text: str) -> bool:
    return re.search(r"^#define __cplusplus ", text, re.MULTILINE) is not None


def _answer_or_nothing(command: list[str]) -> str:
    try:
        return ask(command)
    except BuildError:
        return ""


# --- Starting -----------------------------------------------------------------------------------------------


def ask(command: list[str]) -> str:
    """The output of a question to the compiler, in one language whatever the locale.

    Raises:
        BuildError: it fails, gives no answer in time, or cannot be started.
    """
    spelled = shlex.join(command[:1] if "-E" in command else command)
    limit = min(_QUESTION_SECONDS, build_timeout())
    try:
        status, out, err = start(command, limit, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except subprocess.TimeoutExpired:
        raise CompilerHangsError(
            f"`{spelled}` gave no answer within {limit:g} s and was ended: let CXX name another compiler"
        ) from None
    except OSError as error:
        raise BuildError(f"`{spelled}` cannot be started: {error.strerror or error}") from None
    text = (out + err).decode(errors="replace")
    if status != 0:
        raise BuildError(f"`{spelled}` failed: {errors_in(err.decode(errors='replace') or text) or f'status {status}'}")
    return text


def start(command: list[str], seconds: float, **options: Any) -> tuple[int, bytes, bytes]:
    """Run to the end: status, stdout and stderr, where these are pipes.

    Whatever ends the wait (the time, Ctrl-C) also ends the process and all that it started.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"}, **options)
    with process:
        try:
            out, err = process.communicate(timeout=None if math.isinf(seconds) else seconds)
        except BaseException:
            _end_tree(process.pid)
            raise
    return process.returncode, out or b"", err or b""


def _end_tree(pid: int) -> None:
    """Kill a process and its descendants. ninja gives each compiler a process group of its own: no signal to one group
    reaches them all. Each is stopped before its children are listed, so that it starts no other meanwhile."""
    tree = [pid]
    for member in tree:  # grows while it is walked
        with contextlib.suppress(OSError):
            os.kill(member, signal.SIGSTOP)
        tree += _children(member)
    for member in tree:
        with contextlib.suppress(OSError):
            os.kill(member, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    """Where there is a /proc; elsewhere none."""
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = path.read_bytes().rpartition(b")")[2].split()  # behind the name, which may hold anything
            if int(fields[1]) == pid:
                children.append(int(path.parent.name))
    return children


# --- Settings -----------------------------------------------------------------------------------------------


_VARIABLES = ("CXX", "UNLEARN_EXT_CXXFLAGS", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST")
# What g++, clang and nvcc read by themselves.
_VARIABLES += ("CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")


def variables_in_play() -> str:
    """A line on the variables of the environment that reach a compiler; empty where none is set."""
    present = [f"{name}={os.environ[name]!r}" for name in _VARIABLES if os.environ.get(name)]
    return f"\nset in the environment, and part of this: {', '.join(present)}" if present else ""


def build_timeout() -> float:
    return seconds_setting("UNLEARN_EXT_BUILD_TIMEOUT", 1800.0)


def seconds_setting(name: str, default: float) -> float:
    text = os.environ.get(name)
    try:
        value = float(text) if text else default
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise InputError(f"{name} is {text!r}: expected seconds")
    return value


def split_words(name: str, text: str) -> list[str]:
    """A variable's words, quoted as a shell has it."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"{name} is {text!r}, which a shell would not take ({error}): close it") from None


def jobs() -> int:
    """``MAX_JOBS``, or the cores this process may use, which in a container or a batch job are fewer than there are."""
    text = os.environ.get("MAX_JOBS", "").strip()
    if text:
        if not re.fullmatch(r"0*[1-9][0-9]{0,5}", text):
            raise InputError(f"MAX_JOBS is {text!r}: expected a number from 1 to 999999")
        return int(text)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- What is shown ------------------------------------------------------------------------------------------


def errors_in(text: str) -> str:
    """The first lines that name an error, of a text that may be thousands of lines of other things; else its last."""
    lines = [line.rstrip()[:_LONGEST_LINE] for line in text.splitlines() if line.strip()]
    errors = list(dict.fromkeys(line for line in lines if _ERROR.search(line)))
    causes = [line for line in errors if not line.startswith("ninja: ")]  # which only repeats that there was one
    return "\n".join((causes or errors)[:_ERROR_LINES] or lines[-_LAST_LINES:])


def say(message: str) -> None:
    """A line of progress. A stream that is closed or full is no reason to fail."""
    if os.environ.get("UNLEARN_EXT_QUIET") != "1" and sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(f"unlearn_ext: {message}", file=sys.stderr, flush=True)
