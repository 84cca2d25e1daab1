"""What a run may write over in its output folder: its own, and nothing else."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import pytest
from helpers.models import make
from helpers.runs import identical, run, weights

from unlearn_ext import InputError
from unlearn_ext.errors import UnlearnError
from unlearn_ext.run import lock as output_lock
from unlearn_ext.run.checkpoint_folder import candidates
from unlearn_ext.run.lock import hold
from unlearn_ext.utils.leftovers import LOCK, partial_name


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_into(folder: Path, lr: float = 0.02, **arguments):
    return run(make(), changes={"lr": lr}, output_dir=folder, checkpointing_steps=6, **arguments)


# --- Other runs' and other people's files ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["state.json", "SHA256SUMS"])
def test_another_programs_checkpoint_with_files_of_our_names(name: str, tmp_path: Path) -> None:
    theirs = tmp_path / "checkpoint-500"
    theirs.mkdir()
    (theirs / name).write_text("{}")
    with pytest.raises(InputError, match="there is no checkpoint in"):
        run_into(tmp_path, resume_from_checkpoint="latest")
    with pytest.raises(InputError, match="checkpoint-500, which is no checkpoint of this package"):
        run_into(tmp_path)
    assert files(tmp_path) == {f"checkpoint-500/{name}": b"{}"}


def test_the_working_directory_may_change(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def move(model, done) -> None:
        monkeypatch.chdir(tmp_path / "elsewhere")

    run_into(Path("out"), evaluate=move, evaluate_every=3)
    assert {"checkpoint-6/state.json", "checkpoint-12/state.json", "history.jsonl"} <= files(tmp_path / "out").keys()
    assert len((tmp_path / "out" / "history.jsonl").read_text().splitlines()) == 12
    assert not files(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    (path,) = candidates(None, Path("out", "checkpoint-6"))
    assert path == tmp_path / "out" / "checkpoint-6"


def test_what_is_no_path(tmp_path: Path) -> None:
    for path in (3, b"out", "a\0b"):
        with pytest.raises(InputError, match=r"expected a path, as text or pathlib\.Path, got"):
            run(make(), output_dir=path)
    with pytest.raises(InputError, match="expected 'latest' or a path, got True: pass 'latest'"):
        run_into(tmp_path, resume_from_checkpoint=True)
    with pytest.raises(InputError, match=r"expected a path, as text or pathlib\.Path, got 6"):
        run_into(tmp_path, resume_from_checkpoint=6)


def test_a_run_is_not_resumed_into_the_folder_of_another(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    run_into(a), run_into(b, lr=0.7)
    before = files(b)
    with pytest.raises(InputError, match="b holds checkpoint-6 of another run than the one that is resumed"):
        run_into(b, resume_from_checkpoint=a / "checkpoint-6")
    assert files(b) == before


def test_the_same_settings_do_not_make_it_the_same_run(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    run_into(a), run_into(b)
    with pytest.raises(InputError, match="of another run"):
        run_into(b, resume_from_checkpoint=a / "checkpoint-6")


def test_folders_of_others_stay(tmp_path: Path) -> None:
    """As transformers' Trainer calls its own."""
    run_into(tmp_path / "a")
    for name in ("checkpoint-6", "checkpoint-500"):
        out = tmp_path / name / "out"
        (out / name).mkdir(parents=True)
        (out / name / "trainer_state.json").write_text("{}")
        for resume in ({}, {"resume_from_checkpoint": tmp_path / "a" / "checkpoint-6"}):
            with pytest.raises(InputError, match=f"holds {name}, which is no checkpoint of this package"):
                run_into(out, **resume)
        assert files(out) == {f"{name}/trainer_state.json": b"{}"}


def test_latest_passes_over_folders_of_others(tmp_path: Path) -> None:
    run_into(tmp_path)
    (tmp_path / "checkpoint-500").mkdir()
    with pytest.raises(InputError, match="holds checkpoint-500, which is no checkpoint of this package"):
        run_into(tmp_path, resume_from_checkpoint="latest")
    (tmp_path / "checkpoint-500").rename(tmp_path / "checkpoint-best")
    (tmp_path / "checkpoint-٦").mkdir()  # a digit, but none that a run writes
    assert len(run_into(tmp_path, resume_from_checkpoint="latest").history) == 12


def test_the_limit_removes_the_run_s_own_checkpoints_alone(tmp_path: Path) -> None:
    def drop_in(model, step: int) -> None:
        if step == 5:
            shutil.copytree(tmp_path / "other" / "checkpoint-6", out / "checkpoint-3")
            (out / "checkpoint-1").mkdir()
            (out / "checkpoint-8").mkdir()
            (out / "checkpoint-8" / "mine.txt").write_text("mine")

    run_into(tmp_path / "other")
    out = tmp_path / "out"
    limits = {"checkpointing_steps": 2, "checkpoints_total_limit": 1}
    run(make(), output_dir=out, evaluate=drop_in, evaluate_every=1, **limits)
    names = sorted(path.name for path in out.glob("checkpoint-*"))
    assert names == ["checkpoint-1", "checkpoint-12", "checkpoint-3", "checkpoint-8-damaged-1"]
    assert (out / "checkpoint-8-damaged-1" / "mine.txt").read_text() == "mine"


def test_a_run_goes_on_elsewhere_with_its_history(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    whole = run_into(a)
    before = files(a)
    assert run_into(b, resume_from_checkpoint=a / "checkpoint-6").history == whole.history
    assert files(a) == before
    lines = (b / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == whole.history
    assert run_into(b, resume_from_checkpoint=a / "checkpoint-6").history == whole.history  # the same run's
    assert sorted(path.name for path in b.iterdir()) == ["checkpoint-12", "history.jsonl"]


def test_a_checkpoint_that_was_moved_has_its_history_with_it(tmp_path: Path) -> None:
    whole = run_into(tmp_path / "a")
    moved = shutil.copytree(tmp_path / "a" / "checkpoint-6", tmp_path / "elsewhere")
    assert run(make(), resume_from_checkpoint=moved).history == whole.history


def test_another_runs_history_is_moved_aside_and_not_taken(tmp_path: Path) -> None:
    whole, b = run_into(tmp_path / "a"), tmp_path / "b"
    run(make(), changes={"lr": 0.7}, output_dir=b)
    foreign = (b / "history.jsonl").read_bytes()
    result = run_into(b, resume_from_checkpoint=tmp_path / "a" / "checkpoint-6")
    assert result.history == whole.history and {entry["lr"] <= 0.02 for entry in result.history} == {True}
    assert (b / "history-1.jsonl").read_bytes() == foreign


@pytest.mark.parametrize("text", ['{"epoch": 1, "loss": 0.5}\n', "notes of mine\n"])
@pytest.mark.parametrize("linked", [False, True])
def test_a_history_that_no_run_wrote_is_moved_aside(text: str, linked: bool, tmp_path: Path) -> None:
    whole, b, mine = run_into(tmp_path / "a"), tmp_path / "b", tmp_path / "mine.jsonl"
    b.mkdir()
    mine.write_text(text)
    (b / "history.jsonl").symlink_to(mine) if linked else (b / "history.jsonl").write_text(text)
    result = run_into(b, resume_from_checkpoint=tmp_path / "a" / "checkpoint-6")
    assert result.history == whole.history
    assert (b / "history-1.jsonl").read_text() == mine.read_text() == text


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe{", b'{"iteration": ', b"[1]", b"[" * 5000, b"1" * 5000])
def test_a_damaged_line_of_the_history_costs_nothing_else(damage: bytes, tmp_path: Path) -> None:
    whole = run_into(tmp_path)
    file = tmp_path / "history.jsonl"
    lines = file.read_bytes().splitlines()
    lines[2] = damage
    file.write_bytes(b"\n".join(lines) + b"\n")
    result = run_into(tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-6")
    assert result.history == whole.history
    assert [json.loads(line) for line in file.read_text().splitlines()] == whole.history
    assert not (tmp_path / "history-1.jsonl").exists()


def test_the_home_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    whole = run(make(), output_dir="~/run", checkpointing_steps=6)
    again = run(make(), resume_from_checkpoint="~/run/checkpoint-6")
    assert again.history == whole.history and not (tmp_path / "~").exists()
    whole.mask.save("~/masks/mask.safetensors")
    assert type(whole.mask).load("~/masks/mask.safetensors") == whole.mask
    assert (tmp_path / "home" / "masks" / "mask.safetensors").is_file()


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_checkpoints_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        run_into(tmp_path / "out")
    finally:
        os.umask(before)
    paths = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert len(paths) > 10
    for path in paths:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


# --- One run at a time ----------------------------------------------------------------------------------------


def test_a_second_run_is_refused_in_one_sentence(tmp_path: Path) -> None:
    refused: list[str] = []

    def start_another(model, step: int) -> None:
        for resume in ({}, {"resume_from_checkpoint": "latest"}):
            with pytest.raises(InputError) as caught:
                run_into(tmp_path, **resume)
            refused.append(str(caught.value))

    whole = run_into(tmp_path, evaluate=start_another, evaluate_every=7)
    sentence = rf"another run (process {os.getpid()} on "
    assert len(refused) == 2 and all(sentence in text and "\n" not in text for text in refused)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-6", "history.jsonl"]
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == len(whole.history)


def test_the_lock_is_let_go_after_an_error(tmp_path: Path) -> None:
    def fail(model, step: int) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        run_into(tmp_path, evaluate=fail, evaluate_every=7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "history.jsonl"]
    assert len(run_into(tmp_path, resume_from_checkpoint="latest").history) == 12


def _die_with_the_lock(folder: str) -> None:
    lock = hold(Path(folder))
    lock.__enter__()
    os._exit(1)  # as a killed process: nothing is tidied up


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    killed = multiprocessing.get_context("fork").Process(target=_die_with_the_lock, args=(str(tmp_path),))
    killed.start()
    killed.join()
    assert [path.name for path in tmp_path.iterdir()] == [".unlearn_ext.lock"]
    run_into(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-6", "history.jsonl"]


def _wait(ready, end) -> None:
    ready.set()
    end.wait(30)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_copy_of_the_lock_in_a_child_does_not_outlive_the_run(tmp_path: Path) -> None:
    """A loader's worker that is still there would else hold the folder of a run that was killed."""
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    lock = hold(tmp_path)
    lock.__enter__()
    child = context.Process(target=_wait, args=(ready, end))
    child.start()
    assert ready.wait(30)
    with open(os.devnull) as other:
        os.dup2(other.fileno(), *output_lock._held)  # lets the parent's go, as the kernel does when the run is killed
    with hold(tmp_path):
        pass
    end.set()
    child.join()
    lock.__exit__(None, None, None)


def test_two_threads_that_start_at_once(tmp_path: Path) -> None:
    entered, refused, gate = [], [], threading.Barrier(8)

    def attempt() -> None:
        gate.wait()
        try:
            with hold(tmp_path):
                entered.append(1)
                assert len(entered) == 1
                inside.wait(30)
        except UnlearnError:
            refused.append(1)
            if len(refused) == 7:
                inside.set()

    inside = threading.Event()
    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(entered), len(refused)) == (1, 7) and not list(tmp_path.iterdir())


def test_a_lock_whose_file_was_removed_before_it_was_taken(tmp_path: Path, monkeypatch) -> None:
    """By its last holder, so that a second file of that name could be locked as well."""
    fcntl = pytest.importorskip("fcntl")
    flock, asked = fcntl.flock, []

    def flock_late(handle: int, how: int) -> None:
        if not asked:
            (tmp_path / LOCK).unlink()
        asked.append(how)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    with hold(tmp_path), pytest.raises(InputError, match="another run"), hold(tmp_path):
        pass
    assert len(asked) == 3


# --- Leftovers ------------------------------------------------------------------------------------------------


def test_leftovers_of_killed_runs_are_swept(tmp_path: Path) -> None:
    names = [".unlearn_ext-0123abcd-17-01234567-checkpoint-6"]
    names.append(partial_name("history.jsonl").replace(f"-{os.getpid()}-", "-999999999-"))
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"part")
    (tmp_path / ".probe-ab12_xyz").touch()
    foreign = [".probe-response", ".checkpoint-1-original", ".unlearn_ext-notes", ".mine-ab12cdef"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    folders = [".folder-settings", ".folder-old-projects", ".probe-settings", ".checkpoint-6-old-abc12345"]
    for name in folders:
        (tmp_path / name).mkdir()
    run_into(tmp_path)
    names = ["checkpoint-12", "checkpoint-6", "history.jsonl", *foreign, *folders]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_what_a_living_process_writes_is_not_swept(tmp_path: Path) -> None:
    from unlearn_ext.utils.files import atomic_path, writable_directory

    with atomic_path(tmp_path / "file") as partial:
        partial.write_text("half")
        writable_directory(tmp_path)
        assert partial.exists()
    assert (tmp_path / "file").read_text() == "half"


def test_resumed_runs_are_the_same_wherever_they_go_on(tmp_path: Path) -> None:
    whole, elsewhere = make(), make(seed=4)
    run(whole, output_dir=tmp_path / "a", checkpointing_steps=6)
    run(elsewhere, output_dir=tmp_path / "b", resume_from_checkpoint=tmp_path / "a" / "checkpoint-6")
    assert identical(weights(whole), weights(elsewhere))
