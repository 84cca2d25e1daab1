"""What every command does with its arguments: options given twice, home folders, numbers out of reach, plain output."""

from __future__ import annotations

import io
import os
import re
import runpy
import sys
import warnings
from functools import wraps
from pathlib import Path

import pytest
import torch
import typer

from unlearn_ext import cli
from unlearn_ext.cli import main
from unlearn_ext.cli.ending import demo_warnings, end, show_warnings
from unlearn_ext.cli.report import plain_console
from unlearn_ext.errors import InputError, UnlearningWarning
from unlearn_ext.utils.files import write_json
from unlearn_ext.utils.streams import escape_unprintable

COMMANDS = typer.main.get_command(cli._app()).commands
SEVERAL = {("forget", "--forget-class"), ("forget", "--forget-prompt")}
OPTIONS = [
    (name, option.opts[0], option.is_flag, option.secondary_opts)
    for name, command in COMMANDS.items()
    for option in command.params
    if option.param_type_name == "option"
]


@pytest.mark.parametrize(("command", "option", "flag", "opposite"), OPTIONS, ids=lambda value: str(value))
def test_an_option_given_twice_is_refused(command, option, flag, opposite, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("unlearn_ext.cli.arguments.checked", lambda function: wraps(function)(lambda **given: 0))
    for again in (option, option.replace("-", "_").replace("__", "--", 1), *opposite):
        given = [option, again] if flag else [option, "1", f"{again}=2"]
        code, error = main([command, *given]), capsys.readouterr().err
        if (command, option) in SEVERAL:
            assert "more than once" not in error
        else:
            assert code == 2 and "more than once" in error and option in error


@pytest.mark.parametrize("given", [["--output-dir", ""], ["--output_dir="], ["--json", ""], ["--device="]])
def test_an_empty_value_is_refused(given, capsys, monkeypatch, tmp_path) -> None:
    """As of a shell's variable that is not set: an empty path would be the current folder."""
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *given]) == 2
    assert "expected a value, got an empty text" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_all_commands_are_looked_at() -> None:
    assert set(COMMANDS) == {"demo", "forget", "compare", "profile"} and len(OPTIONS) > 60


@pytest.mark.parametrize("form", [["--output-dir=~/x"], ["--output-dir", "~/x"], ["--output_dir=~/x"]])
def test_a_home_folder_is_followed(form, tmp_path, monkeypatch) -> None:
    seen = []

    def look(output_dir: Path = Path("x")) -> int:
        seen.append(output_dir)
        return 0

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("unlearn_ext.cli.demo.demo", look)
    assert main(["demo", *form]) == 0
    assert seen == [tmp_path / "x"]


def test_texts_are_decoded_as_in_a_utf_8_locale() -> None:
    from unlearn_ext.cli.arguments import checked

    raw, seen = "é".encode().decode("ascii", "surrogateescape"), {}
    look = checked(lambda **arguments: seen.update(arguments) or 0)
    look(forget_class=[raw, "3"], replace_prompt=raw, shapes=raw, data=Path(raw))  # paths are as the system has them
    assert seen == {"forget_class": ["é", "3"], "replace_prompt": "é", "shapes": raw, "data": Path(raw)}


def test_a_hyphen_is_stdout() -> None:
    from unlearn_ext.cli.arguments import checked

    seen = {}
    checked(lambda **arguments: seen.update(arguments) or 0)(json_file=Path("-"), data=Path("-"))
    assert seen == {"json_file": Path("/dev/stdout"), "data": Path("-")}


@pytest.mark.parametrize("command", [None, *COMMANDS])
@pytest.mark.parametrize("columns", ["60", "80"])
def test_every_option_can_be_read_in_the_help(command, columns, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main([*filter(None, [command]), "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= int(columns) and "list[" not in text
    options = [option for option in COMMANDS[command].params if option.opts[0][0] == "-"] if command else []
    for option in options:
        for name in (*option.opts, *option.secondary_opts):
            assert re.search(rf"{name}( |$)", text, re.MULTILINE)


def test_a_checkpoint_may_lie_in_the_home_folder(tmp_path, monkeypatch) -> None:
    from unlearn_ext.cli.arguments import checked

    monkeypatch.setenv("HOME", str(tmp_path))
    seen = {}
    look = checked(lambda **arguments: seen.update(arguments) or 0)
    look(resume_from_checkpoint="~/checkpoint-3", shapes="~/a.safetensors", preset="~")
    assert seen == {
        "resume_from_checkpoint": str(tmp_path / "checkpoint-3"),
        "shapes": str(tmp_path / "a.safetensors"),
        "preset": "~",
    }
    look(resume_from_checkpoint="latest", shapes=None)
    assert seen["resume_from_checkpoint"] == "latest" and seen["shapes"] is None


@pytest.mark.parametrize(
    "given",
    [
        ["compare", "--epochs", str(2**63 - 1)],
        ["compare", "--seeds", "1" + "0" * 40],
        ["compare", "--forget-fraction", "nan"],
        ["compare", "--batch-size", "2000000000"],
        ["demo", "--forget-fraction", "inf", "--scenario", "random"],
        ["demo", "--train-size", str(-(2**63))],
        ["profile", "--repeats", str(2**62)],
    ],
    ids=lambda given: " ".join(given)[:40],
)
def test_numbers_out_of_reach_are_one_sentence(given, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(given) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {given[1]}: expected") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["9" * 5000, "nan", "1e62"])
def test_what_is_no_integer_is_a_usage_error(value, capsys) -> None:
    assert main(["compare", "--epochs", value]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_too_little_memory_is_one_sentence(monkeypatch, capsys) -> None:
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):

        def fail(error=error) -> None:
            raise error

        monkeypatch.setattr("unlearn_ext.cli.demo.demo", lambda: fail())
        assert main(["demo"]) == 1
        assert capsys.readouterr().err.startswith("error: there is not enough memory")
    monkeypatch.setattr("unlearn_ext.cli.demo.demo", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["demo"])


def test_ctrl_c_before_a_command_begins(monkeypatch, capsys) -> None:
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# --- What is printed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_can_be_printed(encoding, monkeypatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with escape_unprintable():
        plain_console().print("Fréchet 1.5 ± 0.2 × ✓ 猫 \udcff")
        sys.stdout.flush()
    assert sys.stdout.errors == "strict"
    text = raw.getvalue().decode(encoding)
    assert (
        text
        == {
            "ascii": "Frechet 1.5 +- 0.2 x ok \\u732b \\udcff\n",
            "latin-1": "Fréchet 1.5 ± 0.2 × ok \\u732b \\udcff\n",
            "utf-8": "Fréchet 1.5 ± 0.2 × ✓ 猫 \\udcff\n",
        }[encoding]
    )


def test_names_of_the_users_are_escaped_and_not_spelled(monkeypatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with escape_unprintable():
        plain_console().print("Fréchet 2 ± 1 in a/café or café, /tmp/α×2 of −α", soft_wrap=True)
        sys.stdout.flush()
    assert raw.getvalue() == b"Frechet 2 +- 1 in a/caf\\xe9 or caf\\xe9, /tmp/\\u03b1\\xd72 of -alpha\n"


def test_an_ascii_locale_passes_file_names_on_and_spells_symbols(monkeypatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="surrogateescape"))
    with escape_unprintable():
        plain_console().print("caf\udcc3\udca9: 2 ×")
        sys.stdout.flush()
    assert raw.getvalue() == "café: 2 x\n".encode() and sys.stdout.errors == "surrogateescape"


def test_helps_and_progress_can_be_printed_in_ascii(monkeypatch) -> None:
    from unlearn_ext.cli.progress import stages

    raw, bars = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(bars, encoding="ascii"))
    assert main(["forget", "--help"]) == 0
    with escape_unprintable(), stages(plain_console(stderr=True)) as report:
        report("training", 3, 3)
    sys.stdout.flush(), sys.stderr.flush()
    assert b"--forget-class" in raw.getvalue() and b"Exit codes" in raw.getvalue()
    assert b"training" in bars.getvalue() and b"\\u" not in bars.getvalue()


def test_the_table_of_methods_can_be_printed_in_ascii(monkeypatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    runpy.run_module("unlearn_ext.methods.__main__")
    sys.stdout.flush()
    assert b"-alpha mean loss" in raw.getvalue() and b"\\u" not in raw.getvalue()


def test_a_reader_that_leaves_ends_nothing(monkeypatch) -> None:
    """As ``unlearn-ext demo | head``: what is printed then goes nowhere."""
    reading, writing = os.pipe()
    os.close(reading)
    done = []
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.FileIO(os.dup(writing), "w"), encoding="utf-8"))

    def work() -> int:
        for stderr in (False, True):
            plain_console(stderr=stderr).print("x" * 100_000)
        print("said")
        write_json("/proc/self/fd/" + str(writing), {"result": 1})  # as --json /dev/stdout
        done.append(True)
        return 3

    monkeypatch.setattr("unlearn_ext.cli.demo.demo", lambda: work())
    before = sys.stdout
    assert main(["demo"]) == 3 and done == [True]
    assert sys.stdout is before
    sys.stdout.write("later"), sys.stdout.close(), sys.stderr.close()  # the interpreter's end
    os.close(writing)


def test_a_closed_output_is_no_output(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr("unlearn_ext.cli.demo.demo", lambda: plain_console().print("to nobody"))
    assert main(["demo"]) == 0 and sys.stdout is None


def test_a_warning_of_ours_is_a_sentence_on_its_own(monkeypatch, capsys) -> None:
    def warn() -> int:
        for _ in range(2):
            warnings.warn("the target was not met", UnlearningWarning, stacklevel=1)
        warnings.warn_explicit("there is no compiler", RuntimeWarning, cli.__file__, 1)
        warnings.warn_explicit("theirs", UserWarning, "theirs.py", 1)
        return 0

    monkeypatch.setattr("unlearn_ext.cli.demo.demo", lambda: warn())
    with pytest.warns(UserWarning, match="theirs") as others:
        assert main(["demo"]) == 0
    assert len(others) == 1
    assert capsys.readouterr().err == "warning: the target was not met\nwarning: there is no compiler\n"


UNMET = ("still_drawn", "retained_lost", "not_judged", "not_seen_before", "still_known", "failed salun")
UNMET += ("target", "unmoved", "retain", "batch_norm")


def test_codes_of_warnings(capsys) -> None:
    """Code 3 has its reasons in the last lines, whatever was printed when they arose."""
    assert end({}) == end({"momentum": "...", "strength": "..."}) == 0
    assert capsys.readouterr() == ("", "")
    for key in UNMET:
        assert end({"momentum": "a", key: "b " * 100}) == 3
        assert capsys.readouterr() == ("", f"exit code 3: {'b ' * 100}\n")


def test_a_reason_is_said_when_it_arises_and_at_the_end(monkeypatch, capsys) -> None:
    found = {"unmoved": "nothing moved", "unseen": "a hint"}

    def work() -> int:
        for sentence in found.values():
            warnings.warn(sentence, UnlearningWarning, stacklevel=1)
        plain_console().print("model: out")
        show_warnings(found | {"retain": "lost", "momentum": "late"}, plain_console())
        return end(found)

    monkeypatch.setattr("unlearn_ext.cli.demo.demo", lambda: work())
    assert main(["demo"]) == 3
    output = capsys.readouterr()
    assert output.err.splitlines() == ["warning: nothing moved", "warning: a hint", "exit code 3: nothing moved"]
    assert output.out.splitlines() == ["model: out", "warning: late"]


def test_a_demo_that_knew_nothing_before_says_nothing_of_forgetting() -> None:
    assert demo_warnings("the digit 3", 0.1, 0.0, {}).keys() == {"not_seen_before"}
    assert demo_warnings("the digit 3", 0.9, 0.6, {}).keys() == {"still_known"}
    assert demo_warnings("the digit 3", 0.9, 0.0, {"a": "b"}) == demo_warnings(None, 0.0, 0.0, {"a": "b"}) == {"a": "b"}


def test_what_a_command_returns_is_the_exit_code(monkeypatch) -> None:
    codes = [3, 0]
    monkeypatch.setattr("unlearn_ext.cli.demo.demo", lambda: codes.pop())
    assert main(["demo"]) == 0 and main(["demo"]) == 3


def test_an_error_is_code_1(monkeypatch, capsys) -> None:
    def refuse() -> int:
        raise InputError("no")

    monkeypatch.setattr("unlearn_ext.cli.demo.demo", lambda: refuse())
    assert main(["demo"]) == 1 and capsys.readouterr().err == "error: no\n"
