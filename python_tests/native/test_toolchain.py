"""The compiler: which one is taken, how it is called, what is shown of what it says, and that it ends."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from unlearn_ext.errors import InputError
from unlearn_ext.native import building, cuda, loading, recipes, toolchain

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).parent / "programs"
CXX = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
AWKWARD = "a\nb'c\"d $HOME $$ | : ü \\ # & ; *"

needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CXX", "MAX_JOBS", "UNLEARN_EXT_CXXFLAGS", "UNLEARN_EXT_BUILD_TIMEOUT", "UNLEARN_EXT_LOCK_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    """Makes a program of a few lines of shell."""

    def make(text: str, name: str = "compiler") -> str:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    return sources(tmp_path / "csrc")


def sources(csrc: Path) -> Path:
    """Two translation units in the layout of csrc/ that compile at once."""
    (csrc / "cpu").mkdir(parents=True)
    (csrc / "math").mkdir()
    (csrc / "cpu" / "answer.cpp").write_text('extern "C" int answer() { return 42; }\n')
    (csrc / "cpu" / "other.cpp").write_text("int other;\n")
    return csrc


def tiny(compiler: str, csrc: Path) -> recipes.Recipe:
    """The same without a question to the compiler."""
    return recipes.Recipe(
        "libtiny.so", csrc, ("cpu/answer.cpp", "cpu/other.cpp"), (compiler,), ("-fPIC",), ("-shared",)
    )


# --- Which one ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cxx, reason",
    [
        ("/bin/true", "it does not say which C++ it knows"),
        ("/bin/echo", "it does not say which C++ it knows"),
        ("/bin/false", "`/bin/false` failed"),
        ("/bin/ls", "invalid option"),
        (f"{sys.executable} -c pass", "it does not say which C++ it knows"),
        ("/bin", "is not a program"),
        (__file__, "is not a program"),
        ("/no/such/compiler", "was not found"),
        ("no-such-launcher g++", "'no-such-launcher', was not found"),
    ],
)
def test_a_cxx_that_is_no_compiler_is_one_sentence(cxx: str, reason: str, csrc, monkeypatch) -> None:
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(loading.ToolchainError) as caught:
        recipes.cpu_recipe(csrc)
    message = str(caught.value)
    assert "CXX" in message and reason in message and "\n" not in message, message


def test_a_program_that_cannot_be_started_is_one_sentence(script, csrc, monkeypatch) -> None:
    program = Path(script("", "compiler"))
    program.write_bytes(b"\0not a program")
    monkeypatch.setenv("CXX", str(program))
    with pytest.raises(loading.ToolchainError, match=r"cannot be started: Exec format error"):
        recipes.cpu_recipe(csrc)


def test_a_host_compiler_that_is_none_is_found_before_nvcc_is_started(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "/bin/true")
    monkeypatch.setattr(cuda, "find_nvcc", lambda: "/no/such/nvcc")
    with pytest.raises(loading.ToolchainError, match=r"CXX is '/bin/true', which does not work as a C\+\+ compiler"):
        cuda.nvcc_command(("90",))


@needs_compiler
def test_a_refused_flag_is_the_flags_fault(csrc, monkeypatch) -> None:
    monkeypatch.setenv("UNLEARN_EXT_CXXFLAGS", "-no-such-flag")
    with pytest.raises(loading.BuildError, match=r"environment.* UNLEARN_EXT_CXXFLAGS='-no-such-flag'"):
        recipes.cpu_recipe(csrc)


def test_a_failing_compile_names_the_variables_that_reach_it(script, csrc, tmp_path, monkeypatch) -> None:
    compiler = script('echo "x.cpp:1: error: the cause" >&2; exit 1')
    monkeypatch.setenv("UNLEARN_EXT_CXXFLAGS", "-DA=1 -w")
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(loading.BuildError) as caught:
        building.build_cached(tiny(compiler, csrc), tmp_path / "cache")
    last = str(caught.value).splitlines()[-1]
    assert f"CXX={compiler!r}, UNLEARN_EXT_CXXFLAGS='-DA=1 -w'" in last


@needs_compiler
def test_cxx_may_hold_a_launcher_arguments_or_a_path_with_spaces(script, csrc, tmp_path, monkeypatch) -> None:
    launcher = script(f'echo "$1" >> {tmp_path}/log; exec "$@"', "ccache")
    spaced = script(f'exec {CXX} "$@"', "my compiler")
    for cxx, start in {
        f"{launcher} {CXX} -DX": (launcher, CXX, "-DX"),
        f"{shlex.quote(spaced)} -DX": (spaced, "-DX"),
        spaced: (spaced,),
    }.items():
        monkeypatch.setenv("CXX", cxx)
        assert recipes.cpu_recipe(csrc).compiler == start
    monkeypatch.setenv("CXX", f"{launcher} {CXX}")
    assert building.build(csrc, tmp_path / "cache").is_file()
    assert set((tmp_path / "log").read_text().split()) == {CXX}
    assert toolchain.host_compiler((launcher, str(CXX), "-DX")) == CXX
    assert toolchain.host_compiler((launcher, Path(CXX).name)) == CXX
    assert toolchain.host_compiler((spaced, "-DX")) == spaced


# --- How it is called ---------------------------------------------------------------------------------------


@needs_compiler
def test_any_character_in_paths_and_flags(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("UNLEARN_EXT_CXXFLAGS", """'-DTEXT="a $HOME $$ '"'"' b"' -DMORE=1""")
    csrc = sources(tmp_path / AWKWARD / "csrc")
    (csrc / "cpu" / "answer.cpp").write_text(
        "constexpr char text[] = TEXT;\nstatic_assert(sizeof text == 14 + MORE && text[11] == '\\'', \"\");\n"
    )
    library = building.build(csrc, tmp_path / AWKWARD / "cache")
    assert library.is_file() and library.is_relative_to(tmp_path / AWKWARD)
    assert not (tmp_path / "a").exists()


@needs_compiler
@pytest.mark.process
def test_paths_beyond_the_locale(tmp_path) -> None:
    csrc, cache = sources(tmp_path / AWKWARD / "csrc"), tmp_path / AWKWARD / "cache"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = os.environ | ascii_only | {"PYTHONPATH": str(ROOT), "UNLEARN_EXT_CACHE": str(cache)}
    environment.pop("UNLEARN_EXT_QUIET", None)
    for said in (2, 0):  # built, then found
        done = subprocess.run(
            [sys.executable, str(PROGRAMS / "load_tiny.py"), str(csrc)], env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout.splitlines()[0]) == (0, "native"), done.stderr
        assert done.stderr.count("unlearn_ext: ") == said


@pytest.mark.parametrize("name", ["CXX", "UNLEARN_EXT_CXXFLAGS"])
def test_an_open_quote_is_named(name: str, csrc, monkeypatch) -> None:
    if CXX is None and name != "CXX":
        pytest.skip("no C++ compiler")
    monkeypatch.setenv(name, "'open")
    with pytest.raises(InputError, match=f'{name} is "\'open", which a shell would not take'):
        recipes.cpu_recipe(csrc)


@pytest.mark.parametrize("text", ["x", "0", "-1", "1.5", "1e3", "²"])
def test_max_jobs_that_is_no_number(text: str, monkeypatch) -> None:
    monkeypatch.setenv("MAX_JOBS", text)
    with pytest.raises(InputError, match=r"MAX_JOBS is .*: expected a number from 1"):
        toolchain.jobs()


@pytest.mark.parametrize("name", ["UNLEARN_EXT_BUILD_TIMEOUT", "UNLEARN_EXT_LOCK_TIMEOUT"])
@pytest.mark.parametrize("text, seconds", [("x", None), ("nan", None), ("-1", None), ("", 7.0), ("2.5", 2.5)])
def test_seconds(name: str, text: str, seconds: float | None, monkeypatch) -> None:
    monkeypatch.setenv(name, text)
    if seconds is None:
        with pytest.raises(InputError, match=f"{name} is .*: expected seconds"):
            toolchain.seconds_setting(name, 7.0)
    else:
        assert toolchain.seconds_setting(name, 7.0) == seconds


# --- That it ends -------------------------------------------------------------------------------------------


def gone(pid: int) -> bool:
    """Whether a process has ended, be it that nobody has asked how."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


# Starts another process, both deaf to what a terminal sends, and waits for ever.
HANG = 'trap "" TERM INT HUP; sleep 1000 & echo $! $$ >> {pids}; wait; wait'


def test_a_compiler_that_hangs_at_a_question_is_ended(script, csrc, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", script(HANG.format(pids=tmp_path / "pids")))
    monkeypatch.setenv("UNLEARN_EXT_BUILD_TIMEOUT", "0.3")
    with pytest.raises(loading.BuildError, match=r"gave no answer within 0.3 s and was ended: let CXX name another"):
        recipes.cpu_recipe(csrc)
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2, "asked once"
    assert all(gone(int(pid)) for pid in pids)


def test_a_compiler_that_hangs_at_the_build_is_ended(script, csrc, tmp_path, monkeypatch) -> None:
    compiler = script(HANG.format(pids=tmp_path / "pids"))
    monkeypatch.setenv("UNLEARN_EXT_BUILD_TIMEOUT", "0.5")
    with pytest.raises(loading.BuildError, match=r"was ended after 0.5 s .*UNLEARN_EXT_BUILD_TIMEOUT gives it longer"):
        building.build_cached(tiny(compiler, csrc), tmp_path / "cache")
    pids = (tmp_path / "pids").read_text().split()
    assert pids and all(gone(int(pid)) for pid in pids)
    assert not list(tmp_path.glob("cache/*/build-*")) and not list(tmp_path.glob("cache/*/*.so"))


def test_an_interrupt_ends_what_was_started(script, tmp_path, monkeypatch) -> None:
    def interrupted(process: subprocess.Popen, *_: object, **__: object) -> None:
        while not (tmp_path / "pids").exists() or len((tmp_path / "pids").read_text().split()) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toolchain.start([script(HANG.format(pids=tmp_path / "pids"))], 60)
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_a_compiler_that_says_it_is_done_and_is_not(script, csrc, tmp_path) -> None:
    with pytest.raises(loading.BuildError, match=r"says that it has built the library, and has not; full log: /"):
        building.build_cached(tiny(script("exit 0"), csrc), tmp_path / "cache")


# --- What is shown ------------------------------------------------------------------------------------------


def test_the_compilers_error_comes_first(script, csrc, tmp_path) -> None:
    compiler = script(
        'for i in $(seq 50); do echo "#define MACRO_$i $i"; done\n'
        'echo "cpu/answer.cpp:1:10: error: the cause" >&2\n'
        'echo "cpu/answer.cpp:1:10: error: the cause" >&2\n'
        'for i in $(seq 50); do echo "#define MORE_$i $i"; done\n'
        "exit 1"
    )
    with pytest.raises(loading.BuildError) as caught:
        building.build_cached(tiny(compiler, csrc), tmp_path / "cache")
    first, second, third, *rest = str(caught.value).splitlines()
    assert (first, second) == ("the native library does not compile:", "cpu/answer.cpp:1:10: error: the cause")
    assert third.startswith("full log: /") and not rest
    assert "#define MORE_50 50" in Path(third.removeprefix("full log: ")).read_text()


def test_a_question_shows_its_error_and_not_what_came_before(script) -> None:
    compiler = script(
        'for i in $(seq 50); do echo "#define MACRO_$i $i"; done\necho "cc1plus: error: bad value" >&2\nexit 1'
    )
    with pytest.raises(loading.BuildError) as caught:
        toolchain.ask([compiler, "-E"])
    assert str(caught.value) == f"`{compiler}` failed: cc1plus: error: bad value"


@pytest.mark.parametrize(
    "line",
    [
        "x.cpp:3:1: fatal error: nothing.h: No such file or directory",
        'x.cu(3): error: identifier "y" is undefined',
        "x.cu(3): error #20: identifier is undefined",
        "ptxas fatal   : Unresolved extern function",
        "/usr/bin/ld: cannot find -ltorch_cpu: No such file or directory",
        "x.cpp:(.text+0x5): undefined reference to `missing()'",
        "c++: fatal error: Killed signal terminated program cc1plus",
        "cc1plus: out of memory allocating 65536 bytes",
        "/tmp/x.s: Fatal: can't write: No space left on device",
        "clang: error: linker command failed with exit code 1",
    ],
)
def test_what_is_an_error(line: str) -> None:
    noise = [f"#define ERROR_{i} error_{i}" for i in range(40)]
    noise += ["x.cpp:1: warning: unused [-Werror=unused]", "In file included from x.cpp:1:"]
    assert toolchain.errors_in("\n".join([*noise, line, *noise, "ninja: build stopped: subcommand failed."])) == line


def test_the_last_lines_where_no_line_names_an_error() -> None:
    lines = [f"line {i}" for i in range(100)]
    assert toolchain.errors_in("\n".join(lines)) == "\n".join(lines[-10:])
    assert toolchain.errors_in("ninja: error: no such file") == "ninja: error: no such file"
    assert len(toolchain.errors_in("error: " + 10_000 * "x")) == 300
    assert toolchain.errors_in("\n".join(f"error: {i}" for i in range(100))).count("\n") == 4


class FullStream:
    def write(self, text: str) -> None:
        raise OSError(28, "No space left on device")

    flush = write


def test_progress_lines_need_no_stream(monkeypatch, capsys) -> None:
    monkeypatch.delenv("UNLEARN_EXT_QUIET", raising=False)
    monkeypatch.setattr(sys, "stderr", None)
    toolchain.say("nothing")
    monkeypatch.setattr(sys, "stderr", FullStream())
    toolchain.say("nothing")
    assert capsys.readouterr().out == ""


@needs_compiler
def test_a_cuda_recipe_names_the_program_behind_a_launcher(script, monkeypatch) -> None:
    launcher = script('exec "$@"', "sccache")
    monkeypatch.setenv("CXX", f"{launcher} {CXX} -DX")
    monkeypatch.setattr(cuda, "find_nvcc", lambda: "/no/such/nvcc")
    assert cuda.nvcc_command(("90",))[0] == ("/no/such/nvcc", "-ccbin", CXX)
