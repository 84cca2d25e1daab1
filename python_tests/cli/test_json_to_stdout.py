"""``--json /dev/stdout``: what reads the pipe gets JSON and nothing else."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from unlearn_ext.cli.report import plain_console


def text_goes_to_stderr(stdout: Path, json_file: Path | None) -> bool:
    with stdout.open("w") as stream, contextlib.redirect_stdout(stream):
        return plain_console(json_file=json_file).stderr


def test_text_goes_to_stderr_where_the_json_is_stdout(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("stdout")
    assert text_goes_to_stderr(tmp_path / "stdout", tmp_path / "stdout")
    assert text_goes_to_stderr(tmp_path / "stdout", link)


def test_other_files_leave_text_on_stdout(tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert not text_goes_to_stderr(tmp_path / "stdout", None)
    assert not text_goes_to_stderr(tmp_path / "stdout", other)
    other.touch()
    assert not text_goes_to_stderr(tmp_path / "stdout", other)


def test_the_null_device_for_both_sends_nothing_to_stderr() -> None:
    assert not text_goes_to_stderr(Path(os.devnull), Path(os.devnull))
