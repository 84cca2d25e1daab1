"""The work folder of ``unlearn-ext forget``: what must not be published is there, and nothing of others is removed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from helpers.forgetting import hashes, plan_of, result, run, run_killed_at, work

from unlearn_ext.errors import InputError
from unlearn_ext.jobs import publishing, space
from unlearn_ext.jobs.output import NOT_YET, check_claim
from unlearn_ext.jobs.pictures import Pictures
from unlearn_ext.jobs.space import Need, check_room, room_for
from unlearn_ext.jobs.work import WorkFolder
from unlearn_ext.run.lock import hold
from unlearn_ext.run.loop import Loop
from unlearn_ext.utils.leftovers import partial_name

STEPS = ("--forget-class", "3", "--checkpointing-steps", "1", "--fisher-storage", "disk")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("keep", [False, True])
def test_the_output_holds_nothing_of_the_forgotten_images_and_no_early_weights(home, tmp_path, keep, capsys) -> None:
    out = tmp_path / "out"
    assert run(home, "dit", out, *STEPS, *(["--keep-work"] if keep else [])) == 0
    assert names(out / "unlearning") == {"result.json", "before-after.png", "mask.safetensors", "history.jsonl"}
    assert names(out) == names(home / "dit") | {"unlearning"}
    assert len((out / "unlearning" / "history.jsonl").read_text().splitlines()) == 2
    if keep:
        assert names(work(out)) == {"latents", "checkpoint-1", "checkpoint-2", "history.jsonl", "work.json"}
        assert f"not to be published: {work(out)}" in capsys.readouterr().out
    else:
        assert names(tmp_path) == {"out"}


def test_nobody_is_told_to_remove_the_work_folder_of_a_run_that_is_alive(home, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    run_killed_at(1, monkeypatch, home, "dit", out, *STEPS)
    for other in (out, tmp_path / "elsewhere"):
        place = ("--work-dir", str(work(out)))
        with hold(work(out)):
            assert run(home, "dit", other, *STEPS, *place) == 1
        assert "another run" in (said := capsys.readouterr().err) and "remove th" not in said
        assert run(home, "dit", other, *STEPS, *place) == 1
        assert "another run" not in (said := capsys.readouterr().err) and "remove th" in said


def test_a_work_folder_elsewhere(home: Path, tmp_path: Path, monkeypatch) -> None:
    out, place = tmp_path / "out", ("--work-dir", str(tmp_path / "scratch" / "w"))
    run_killed_at(1, monkeypatch, home, "dit", out, *STEPS, *place)
    assert names(tmp_path) == {"out", "scratch"} and "checkpoint-1" in names(tmp_path / "scratch" / "w")
    assert run(home, "dit", out, *STEPS, *place, "--resume-from-checkpoint", "latest") == 0
    assert not (tmp_path / "scratch" / "w").exists()


def test_a_folder_of_the_run_is_no_class_of_the_data(home: Path, tmp_path: Path, capsys) -> None:
    data = tmp_path / "data"
    data.symlink_to(home / "digits")
    for out, place in ((data / "3" / "out", ()), (tmp_path / "out", ("--work-dir", str(home / "digits" / "w")))):
        assert run(home, "dit", out, *STEPS, *place, data=str(data)) == 1
        assert " lies in --data, where " in capsys.readouterr().err
    assert names(home / "digits") == set("0123456789")
    assert run(home, "dit", Path("/"), *STEPS, "--dry-run") == 1  # as of a shell's variable that is not set
    assert "choose an empty folder" in capsys.readouterr().err


def test_what_somebody_else_put_into_the_work_folder_stays(home: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    run_killed_at(1, monkeypatch, home, "dit", out, *STEPS)
    mine = ["notes/a.txt", ".git/HEAD", "my-fisher-notes.safetensors", "checkpoint-1-best/x", "history-of-it.jsonl"]
    for name in mine:
        (work(out) / name).parent.mkdir(exist_ok=True)
        (work(out) / name).write_text("mine")
    assert run(home, "dit", out, *STEPS, "--resume-from-checkpoint", "latest") == 0
    left = {str(path.relative_to(work(out))): path.read_text() for path in work(out).rglob("*") if path.is_file()}
    assert left == dict.fromkeys(mine, "mine")


def test_the_work_folder_of_another_run_stays(tmp_path: Path) -> None:
    """Unless a run goes on from its checkpoints: then it is that run's."""
    first, second = (WorkFolder(tmp_path / name, tmp_path / "w") for name in "ab")
    first.claim()
    (tmp_path / "w" / "checkpoint-1").mkdir()
    second.clear()
    assert names(tmp_path / "w") == {"checkpoint-1", "work.json"}
    second.claim()
    first.clear()
    assert names(tmp_path / "w") == {"checkpoint-1", "work.json"}
    second.clear()
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("folder", "content", "words"),
    [
        ("out.work", "a.txt", "holds a.txt and is no work folder of a run: move it away, or name another folder"),
        ("out.work", "work.json", "holds work.json and is no work folder of a run"),
        ("out/w", None, "lie in each other, and the output may be published"),
        ("out", None, "lie in each other"),
        (".", None, "lie in each other"),
        ("model/w", None, "lies in the model's folder"),
    ],
)
def test_a_folder_that_cannot_be_the_work_folder(tmp_path, folder, content, words) -> None:
    (tmp_path / "model").mkdir()
    place = tmp_path / folder
    if content is not None:
        place.mkdir()
        (place / content).write_text('{"format": "mine"}')
    with pytest.raises(InputError, match=words):
        WorkFolder(tmp_path / "out", place).check(tmp_path / "model", resume=False)


def test_a_work_folder_belongs_to_one_output_folder(tmp_path: Path) -> None:
    first, second = (WorkFolder(tmp_path / name, tmp_path / "w") for name in "ab")
    first.claim()
    for folder in (first, WorkFolder(tmp_path / "a", tmp_path / "w")):
        folder.check(tmp_path / "model", resume=False)
    with pytest.raises(InputError, match=r"belongs to the run of .*a: wait until it has ended, or name another folder"):
        second.check(tmp_path / "model", resume=False)
    first.clear()
    assert not (tmp_path / "w").exists()
    second.check(tmp_path / "model", resume=False)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"result.json": json.dumps({"verdict": NOT_YET}), "mask.safetensors": ""}, None),
        ({"history.jsonl": "", "before-after.png": "", partial_name("folder"): ""}, None),
        ({"result.json": json.dumps({"verdict": "not verified: no classifier"})}, "holds the result of a finished run"),
        ({"result.json": "mine"}, "holds the result of a finished run"),
        ({"notes.txt": ""}, r"unlearning holds notes.txt, which no unfinished run leaves"),
        ({".folder-mine": ""}, r"holds .folder-mine, which no unfinished run leaves"),
    ],
)
def test_a_record_without_its_model_is_not_replaced(tmp_path: Path, record, words) -> None:
    (tmp_path / "out" / "unlearning").mkdir(parents=True)
    for name, content in record.items():
        (tmp_path / "out" / "unlearning" / name).write_text(content)
    for resume in (False, True):
        with pytest.raises(InputError, match=words) if words else contextlib.nullcontext():
            check_claim(tmp_path / "out", tmp_path / "model", resume=resume)


def test_a_link_is_followed_to_the_disk_of_the_output(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big" / "out")
    assert WorkFolder(tmp_path / "out").path == (tmp_path / "big" / "out.work").resolve()


def test_a_run_that_fails_before_it_trains_leaves_no_work_folder(home: Path, tmp_path: Path, monkeypatch) -> None:
    def fail(self, directory):
        directory.mkdir()
        raise InputError("no latents")

    monkeypatch.setattr("unlearn_ext.jobs.run.ForgetRun._encode", fail)
    assert run(home, "dit", tmp_path / "out", "--forget-class", "3") == 1
    assert not list(tmp_path.iterdir())


def test_an_output_of_an_earlier_version_is_not_published(home: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "out" / "unlearning" / "latents").mkdir(parents=True)
    assert run(home, "dit", tmp_path / "out", "--forget-class", "3") == 1
    assert "holds latents of a run by an earlier version" in capsys.readouterr().err


# --- Going on -------------------------------------------------------------------------------------------------------


def stop_at(monkeypatch, iteration: int, number: int) -> None:
    iterate = Loop._iterate

    def stopping(self, t):
        if t == iteration:
            signal.raise_signal(number)
        return iterate(self, t)

    monkeypatch.setattr(Loop, "_iterate", stopping)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SIGINT", 130),
        pytest.param("SIGTERM", 143, marks=pytest.mark.slow),
        pytest.param("SIGHUP", 129, marks=pytest.mark.slow),
    ],
)
def test_an_interrupt_says_how_to_go_on(home, tmp_path, monkeypatch, capsys, name, code) -> None:
    stop_at(monkeypatch, 1, getattr(signal, name))
    assert run(home, "dit", tmp_path / "out", *STEPS, "--max-train-steps", "3") == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--resume-from-checkpoint latest goes on" in last and str(work(tmp_path / "out")) in last


def test_an_interrupt_without_checkpoints_says_so(home, tmp_path, monkeypatch, capsys) -> None:
    stop_at(monkeypatch, 1, signal.SIGINT)
    assert run(home, "dit", tmp_path / "out", "--forget-class", "3") == 130
    assert "there is no checkpoint (--checkpointing-steps N writes some)" in capsys.readouterr().err.splitlines()[-1]


def test_an_interrupt_while_pictures_are_judged_leaves_a_whole_model(home, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(Pictures, "verdict", lambda self: signal.raise_signal(signal.SIGINT))
    assert run(home, "dit", out, "--forget-class", "3") == 130
    assert "is whole, and its pictures were not judged" in capsys.readouterr().err.splitlines()[-1]
    assert names(out) == names(home / "dit") | {"unlearning"} and not work(out).exists()
    assert result(out)["verdict"] == "not verified: the run was cut off before its pictures were judged"


@pytest.mark.parametrize(
    ("when", "words"),
    [(False, "the same command moves it to its place"), pytest.param(True, "is whole", marks=pytest.mark.slow)],
)
def test_an_interrupt_after_the_pictures_were_judged(home, tmp_path, monkeypatch, capsys, when, words) -> None:
    out, move = tmp_path / "out", publishing.move_output

    def stop(output):
        if when:
            move(output)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "move_output", stop)
        assert run(home, "dit", out, *STEPS) == 143
    last = capsys.readouterr().err.splitlines()[-1]
    assert words in last and "not judged" not in last and "starts anew" not in last
    assert run(home, "dit", out, *STEPS) == 1
    assert names(out) == names(home / "dit") | {"unlearning"} and names(tmp_path) == {"out"}


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("unlearn_ext.jobs.plan.make_plan", "nothing was changed; the same command starts again"),
        ("unlearn_ext.cli.forget.show_result", "is whole"),
    ],
)
def test_an_interrupt_before_and_after_the_run_says_what_is_there(
    home, tmp_path, monkeypatch, capsys, place, words
) -> None:
    monkeypatch.setattr(place, lambda *arguments: signal.raise_signal(signal.SIGINT))
    assert run(home, "dit", tmp_path / "out", *STEPS) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith(words)


@pytest.mark.parametrize("when", [pytest.param("write_output", marks=pytest.mark.slow), "move_output"])
def test_a_model_has_its_result_whenever_a_run_is_killed(home, tmp_path, monkeypatch, when) -> None:
    """The next run finishes it; the work folder goes then."""
    out, make = tmp_path / "out", getattr(publishing, when)

    class Killed(BaseException):
        pass

    def die(*arguments):
        if when == "write_output":
            make(*arguments)
        monkeypatch.setattr(publishing, "move_output", lambda output: None)  # a killed process moves nothing
        raise Killed

    monkeypatch.setattr(publishing, when, die)
    with pytest.raises(Killed):
        run(home, "dit", out, *STEPS)
    assert names(out) == {"unlearning"} and result(out)["forgotten"] == ["three"]
    monkeypatch.undo()
    other = WorkFolder(tmp_path / "b", tmp_path / "w")
    other.claim()
    assert run(home, "dit", out, *STEPS, "--work-dir", str(other.path)) == 1
    assert names(out) == names(home / "dit") | {"unlearning"} and names(tmp_path) == {"out", "w"}
    assert names(other.path) == {"work.json"}


@pytest.mark.parametrize("keep", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_finished_run_says_why_it_is_not_continued(home, tmp_path, capsys, keep) -> None:
    out, more = tmp_path / "out", ("--max-train-steps", "3")
    assert run(home, "dit", out, *STEPS, *(["--keep-work"] if keep else [])) == 0
    before = hashes(out)
    for again in (STEPS, (*STEPS, *more)):
        assert run(home, "dit", out, *again) == 1
        assert "holds a finished run already: choose an empty folder, or, to forget further" in capsys.readouterr().err
        assert run(home, "dit", out, *again, "--resume-from-checkpoint", "latest") == 1
        error = capsys.readouterr().err
        words = (
            "its model is there: use it; or, " if again is STEPS else "another --max-train-steps would not continue it"
        )
        assert f"is finished, and {words}" in error and "--pretrained-model-name" in error
        assert error.count(str(out)) == 1
    assert (
        run(home, "dit", out, *STEPS, "--forget-class", "5", "--seed", "1", "--resume-from-checkpoint", "latest") == 1
    )
    assert "is finished, and it had --forget-class " in capsys.readouterr().err
    if keep:  # into another folder
        choice = ("--resume-from-checkpoint", str(work(out) / "checkpoint-2"))
        assert run(home, "dit", tmp_path / "new", *STEPS, *more, *choice) == 1
        assert "--max-train-steps cannot change in mid-run" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
    assert hashes(out) == before


@pytest.mark.slow
def test_a_result_can_be_forgotten_further(home: Path, tmp_path: Path) -> None:
    assert run(home, "dit", tmp_path / "one", "--forget-class", "3") == 0
    shutil.copytree(home / "digits", tmp_path / "digits")
    os.symlink(tmp_path / "one", tmp_path / "dit")
    assert run(tmp_path, "dit", tmp_path / "two", "--forget-class", "4") == 0
    assert result(tmp_path / "two")["forgotten"] == ["four"]


# --- Disks ----------------------------------------------------------------------------------------------------------


def test_a_dry_run_compares_the_disk(home: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    usage = shutil.disk_usage(tmp_path)
    options = ("--forget-class", "3", "--dry-run", "--checkpointing-steps", "1", "--json", str(tmp_path / "plan.json"))
    assert run(home, "dit", tmp_path / "out", *options) == 0
    assert "MB will be written" in capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [disk["needed"] for disk in plan["disks"]] == [sum(plan["disk"].values())]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=plan["disks"][0]["needed"] - 1))
    assert run(home, "dit", tmp_path / "out", *options) == 1
    printed = capsys.readouterr()
    assert "GB free, and the run writes" in printed.err
    assert "MB are free" in " ".join(printed.out.split())  # the plan all the same
    assert names(tmp_path) == {"plan.json"}


def test_two_disks_are_compared_each_for_itself(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    free = {tmp_path / "a": 10, tmp_path / "b": 20}
    monkeypatch.setattr(space, "_disk_of", lambda path: path.name)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 0, free[Path(path)]))
    needs = [Need("--output-dir", tmp_path / "a" / "x" / "y", 10), Need("the work folder", tmp_path / "b" / "z", 20)]
    rooms = room_for(needs)
    assert [(room.names, room.needed, room.free) for room in rooms] == [
        (("--output-dir",), 10, 10),
        (("the work folder",), 20, 20),
    ]
    check_room(rooms)
    with pytest.raises(InputError, match=r"the disk of .*z has 2e-08 GB free, and the run writes 2\.1e-08 GB"):
        check_room(room_for([needs[0], Need("the work folder", tmp_path / "b" / "z", 21)]))


def test_fisher_sums_on_disk_and_what_is_there_are_counted(home: Path, tmp_path: Path, monkeypatch) -> None:
    options = {"checkpointing_steps": 1, "fisher_storage": "disk"}
    plan = plan_of(home, "dit", tmp_path / "out", **options)
    assert plan.disk["Fisher sums"] == 4 * plan.trained_count
    whole = sum(plan.disk.values())
    assert sum(room.needed for room in plan.rooms()) == whole
    run_killed_at(1, monkeypatch, home, "dit", tmp_path / "out", *STEPS)
    plan = plan_of(home, "dit", tmp_path / "out", resume_from_checkpoint="latest", **options)
    held = plan.work.held()
    assert held["latents"] > 0 and held["checkpoints"] > 0
    assert sum(room.needed for room in plan.rooms()) < whole
