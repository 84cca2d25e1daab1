"""Folders that commands write: nothing of anybody's is replaced, and one run writes at a time."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest

from unlearn_ext import InputError
from unlearn_ext.cli import main
from unlearn_ext.cli.folder import MARK, hold_output
from unlearn_ext.run.lock import hold

COMMANDS = [["demo"], ["demo", "ddpm"], ["compare"]]


@pytest.fixture(autouse=True)
def nothing_is_read_or_trained(monkeypatch) -> None:
    def fail(*arguments, **options):
        raise AssertionError("the run began")

    for name in ("cli.backend.load_backend", "data.load_digits", "demo.classifier.load_digits"):
        monkeypatch.setattr(f"unlearn_ext.{name}", fail)


def error_of(capsys, *arguments: object) -> str:
    assert main(list(map(str, arguments))) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_folder_of_somebody_else_stays_as_it_is(command: list[str], tmp_path: Path, capsys) -> None:
    if command[-1] == "ddpm":
        pytest.importorskip("diffusers")
    for name in ("mask.safetensors", "unlearned.safetensors", "result.json", "unet", "runs"):
        folder = tmp_path / name / "out"
        folder.mkdir(parents=True)
        (folder / name).write_text("mine")
        error = error_of(capsys, *command, "--output-dir", folder)
        assert f"{folder} holds {name} and was not made by unlearn-ext {command[0]}" in error
        assert (folder / name).read_text() == "mine" and len(list(folder.iterdir())) == 1
    folder = tmp_path / "taken"
    folder.mkdir()
    with hold(folder):
        assert "another run (process " in error_of(capsys, *command, "--output-dir", folder)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_result_is_not_also_written_into_the_folder(command: list[str], tmp_path: Path, capsys) -> None:
    if command[-1] == "ddpm":
        pytest.importorskip("diffusers")
    (tmp_path / "link").symlink_to(tmp_path / "out" / "mask.safetensors")
    for file in (tmp_path / "out" / "mask.safetensors", tmp_path / "link"):
        error = error_of(capsys, *command, "--output-dir", tmp_path / "out", "--json", file)
        assert f"--json: {file} lies in --output-dir" in error and not (tmp_path / "out").exists()


def test_a_command_takes_its_marked_folder_again(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for _ in range(2):
        with hold_output(folder, "demo"):
            (folder / "result.json").write_text("{}")
            with pytest.raises(InputError, match="another run"), hold_output(folder, "demo"):
                pass
    assert {path.name for path in folder.iterdir()} == {"result.json", MARK}
    with pytest.raises(InputError, match="was not made by unlearn-ext compare"), hold_output(folder, "compare"):
        pass
    mark = (folder / MARK).read_text()
    for content in ("", "[" * 10**5, '{"command": "demo"}', json.dumps({**json.loads(mark), "command": "compare"})):
        (folder / MARK).write_text(content)
        with pytest.raises(InputError, match="was not made by unlearn-ext demo"), hold_output(folder, "demo"):
            pass


def test_a_link_to_the_mark_of_another_folder_is_none(tmp_path: Path) -> None:
    with hold_output(tmp_path / "own", "demo"):
        pass
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARK).symlink_to(tmp_path / "own" / MARK)
    with pytest.raises(InputError, match="was not made by unlearn-ext demo"), hold_output(tmp_path / "out", "demo"):
        pass


def test_a_folder_that_is_taken_while_it_is_locked_is_not_marked(tmp_path: Path, monkeypatch) -> None:
    @contextlib.contextmanager
    def hold_late(folder: Path):
        (folder / "theirs").write_text("")
        yield

    monkeypatch.setattr("unlearn_ext.run.lock.hold", hold_late)
    with pytest.raises(InputError, match="holds theirs and was not made by"), hold_output(tmp_path / "out", "demo"):
        pass
    assert os.listdir(tmp_path / "out") == ["theirs"]


@pytest.mark.parametrize(
    "options",
    [
        ["--output-dir", "{loop}"],
        ["--output-dir", "{loop}/out"],
        ["--work-dir", "{loop}"],
        ["--json", "{loop}"],
        ["--json", "{loop}/x.json"],
        ["--pretrained-model-name-or-path", "{loop}"],
        ["--data", "{loop}"],
    ],
    ids=" ".join,
)
def test_a_link_to_itself_is_one_sentence(options: list[str], tmp_path: Path, capsys) -> None:
    pytest.importorskip("diffusers")
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    (tmp_path / "data").mkdir()
    words = {
        "--pretrained-model-name-or-path": tmp_path / "model",
        "--data": tmp_path / "data",
        "--output-dir": tmp_path / "out",
        "--forget-class": "3",
    }
    words[options[0]] = options[1].format(loop=loop)
    error = error_of(capsys, "forget", *(word for pair in words.items() for word in pair))
    assert str(loop) in error
    assert sorted(os.listdir(tmp_path)) == ["data", "loop"]
