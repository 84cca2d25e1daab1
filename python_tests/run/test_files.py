"""Atomic files: whole or not there, with the umask's modes, through links, and into devices and pipes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import zeros

from unlearn_ext import InputError
from unlearn_ext.errors import WriteError
from unlearn_ext.utils import files
from unlearn_ext.utils.files import (
    atomic_directory,
    atomic_path,
    check_writable,
    follow_umask,
    user_path,
    writable_directory,
)


def write(path: Path | str, text: str = "new") -> None:
    with atomic_path(path) as partial:
        partial.write_text(text)


@pytest.fixture(params=[0o022, 0o077, 0o002, 0o000], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_follow_the_umask(umask: int, tmp_path: Path) -> None:
    write(tmp_path / "text")
    with atomic_path(tmp_path / "weights.safetensors") as partial:
        save_file({"w": zeros(2)}, partial)  # some versions make a private file of their own
    with atomic_directory(tmp_path / "folder") as partial:
        save_file({"w": zeros(2)}, partial / "weights.safetensors")
        (partial / "inner").mkdir()
        (partial / "inner" / "text").write_text("text")
        follow_umask(partial)
    with atomic_path(tmp_path / "secret", private=True) as partial:
        assert mode(partial) == 0o600 & ~umask
    for path in (tmp_path / "text", *tmp_path.rglob("*.safetensors"), tmp_path / "folder" / "inner" / "text"):
        assert mode(path) == 0o666 & ~umask, path
    for path in (tmp_path / "folder", tmp_path / "folder" / "inner"):
        assert mode(path) == 0o777 & ~umask, path
    assert mode(tmp_path / "secret") == 0o600 & ~umask
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "secret", "text", "weights.safetensors"]


@pytest.mark.parametrize("relative", [False, True])
def test_a_link_is_followed(relative: bool, tmp_path: Path) -> None:
    """To a file in another folder, through another link."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_text("old")
    (tmp_path / "middle").symlink_to("far/file" if relative else tmp_path / "far" / "file")
    (tmp_path / "link").symlink_to("middle" if relative else tmp_path / "middle")
    check_writable(tmp_path / "link")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "middle").is_symlink()
    assert (tmp_path / "far" / "file").read_text() == "new"
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["file"]


def test_a_link_to_what_is_yet_to_be_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere" / "file")
    with pytest.raises(InputError, match="expected a file in a directory that exists"):
        check_writable(tmp_path / "lost")
    with pytest.raises(WriteError, match="lost cannot be written"):
        write(tmp_path / "lost")


def test_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.raises(WriteError, match="link is a link to itself"):
        write(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["link"] and (tmp_path / "link").is_symlink()


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    check_writable(tmp_path / "pipe")
    write(tmp_path / "pipe", "x" * 200_000)  # more than it holds at once
    reader.join()
    assert got == ["x" * 200_000] and stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_a_pipe_that_nobody_reads(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "_READER_SECONDS", 0.05)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WriteError, match="a pipe from which nobody reads: start its reader first"):
        write(tmp_path / "pipe")


def test_devices_stay_devices(tmp_path: Path) -> None:
    for name, number in (("null", 3), ("full", 7)):
        try:
            os.mknod(tmp_path / name, 0o666 | stat.S_IFCHR, os.makedev(1, number))
            (tmp_path / name).open("w").close()
        except PermissionError:
            pytest.skip("making devices takes root")
    (tmp_path / "link").symlink_to(tmp_path / "null")
    for name in ("null", "link"):
        check_writable(tmp_path / name)
        write(tmp_path / name)
    with pytest.raises(WriteError, match="No space left on device"):
        write(tmp_path / "full")
    assert all(stat.S_ISCHR(os.stat(tmp_path / name).st_mode) for name in ("null", "full", "link"))
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "link", "null"]


@pytest.mark.process
@pytest.mark.parametrize("to_file", [False, True])
@pytest.mark.parametrize("name", ["/dev/stdout", "/proc/self/fd/1", "/dev/fd/1"])
def test_open_files_of_the_process(name: str, to_file: bool, tmp_path: Path) -> None:
    """Between what is printed before and after, be it a pipe or a file."""
    program = Path(__file__).parents[1] / "helpers" / "programs" / "print_through.py"
    with (tmp_path / "out").open("w+b") as out:
        done = subprocess.run(
            [sys.executable, program, name],
            stdout=out if to_file else subprocess.PIPE,
            stderr=subprocess.PIPE,
            check=False,
        )
    text = (tmp_path / "out").read_bytes() if to_file else done.stdout
    assert text == b"before\nnew\nafter\n", done.stderr


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="expected a file"):
        check_writable(tmp_path / "folder")
    with pytest.raises(WriteError, match="folder cannot be written"):
        write(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "a." + "s" * 200])
def test_the_longest_names(name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    with atomic_directory(tmp_path / ("d" + name[1:])) as partial:
        (partial / "file").write_text("text")
    assert {path.name for path in tmp_path.iterdir()} == {name, "d" + name[1:]}


def test_an_error_in_the_block_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "file", "old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    for make in (atomic_path, atomic_directory):
        with pytest.raises(ValueError, match="mine"), make(tmp_path / ("file" if make is atomic_path else "folder")):
            raise ValueError("mine")
    assert (tmp_path / "file").read_text() == "old" and (tmp_path / "folder" / "old").exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_the_probe_has_no_name_that_a_kill_could_leave(tmp_path: Path, monkeypatch) -> None:
    import tempfile

    seen, temporary_file = [], tempfile.TemporaryFile

    def look(*arguments, **options):
        file = temporary_file(*arguments, **options)
        seen.append([path.name for path in tmp_path.iterdir()])
        return file

    monkeypatch.setattr(tempfile, "TemporaryFile", look)
    writable_directory(tmp_path)
    assert seen == [[]]


def test_the_home_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~") == tmp_path and user_path(Path("~/a")) == tmp_path / "a"
    for name in ("a/~/b", "~nobody-of-this-name/a", "a~"):
        assert user_path(name) == Path(name)
    write("~/file")
    assert (tmp_path / "file").read_text() == "new"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where nobody knows of one
    with pytest.raises(InputError, match="no home folder that ~ could stand for"):
        user_path("~/a")
