"""The end of ``forget``, killed at whatever moment: a model has its result, and the next run completes or explains."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from helpers.forgetting import hashes, run, work

from unlearn_ext.errors import InputError
from unlearn_ext.jobs.output import claim_output, is_waiting, move_output
from unlearn_ext.run.lock import hold
from unlearn_ext.run.unlearner import Unlearner

STEPS = ("--forget-class", "3", "--checkpointing-steps", "2")


@pytest.mark.slow
def test_every_moment_of_the_end(home: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """What is on the disk before and after each change of a name is what a kill there leaves."""
    out, moments = tmp_path / "out", tmp_path / "moments"
    seen: dict[str, Path] = {}
    finished_with_work: list[str] = []

    noted = []

    def note() -> None:
        if out.exists() and not noted:
            noted.append(True)
            state = json.dumps(sorted(str(path.relative_to(out)) for path in out.rglob("*")))
            if state not in seen:
                seen[state] = shutil.copytree(out, moments / str(len(seen)))
                if "model_index.json" in json.loads(state) and not is_waiting(out) and work(out).exists():
                    finished_with_work.append(state)  # which no later run would remove
            noted.clear()

    def noting(function):
        def call(*arguments, **options):
            note()
            result = function(*arguments, **options)
            note()
            return result

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "rmdir", "unlink", "fsync", "mkdir"):
            patch.setattr(os, name, noting(getattr(os, name)))
        assert run(home, "ddpm", out, *STEPS) == 0
    whole, source = hashes(out), home / "ddpm"
    assert len(seen) > 20 and not finished_with_work
    finished = 0
    for folder in seen.values():
        model, own = (folder / "model_index.json").exists(), folder / "unlearning"
        assert not model or (own / "result.json").exists(), folder
        with hold(folder):
            if is_waiting(folder):  # as the next run does
                move_output(folder)
            try:
                claim_output(folder, source, resume=False)
            except InputError as error:
                finished += 1
                assert "holds a finished run already: choose an empty folder" in str(error)
                there = {name: value for name, value in hashes(folder).items() if name != ".unlearn_ext.lock"}
                assert there == whole and (own / "result.json").exists(), folder
            else:
                assert not model
            left = {path.name for path in folder.rglob(".*")} - {".unlearn_ext.lock"}  # which the run lets go
            assert not left, (folder, left)
            assert (own / "before-after.png").exists() or not (folder / "model_index.json").exists()
    assert 3 < finished < len(seen)


def test_leftovers_of_a_killed_probe_do_not_block_the_next_run(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for folder in (out, out / "unlearning"):
        folder.mkdir()
        for name in (".probe-ab12cd34", ".unlearn_ext-0123abcd-17-01234567-history.jsonl"):
            (folder / name).touch()
    (out / ".unlearn_ext.lock").touch()
    assert run(home, "ddpm", out, *STEPS) == 0
    assert not list(out.rglob(".*"))


def test_a_second_forget_into_the_folder_is_refused(home: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with hold(out):
        assert run(home, "ddpm", out, *STEPS) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert f"error: another run (process {os.getpid()} on " in error and "choose another output directory" in error
    assert not list(out.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("checkpoints", [True, False])
def test_signals_end_the_command_in_order(number, code, checkpoints, home, tmp_path, capsys, monkeypatch) -> None:
    from unlearn_ext.run import loop

    iterate, out = loop.Loop._iterate, tmp_path / "out"

    def send(self, t: int):
        if t == 1:
            os.kill(os.getpid(), number)
        return iterate(self, t)

    steps = ("--forget-class", "3", "--max-train-steps", "4", *(("--checkpointing-steps", "3") if checkpoints else ()))
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_iterate", send)
        assert run(home, "ddpm", out, *steps) == code
    error = " ".join(capsys.readouterr().err.split())
    assert f"stopped by {signal.Signals(number).name} after 2 of 4 iterations: " in error
    assert "Warning" not in error and "Traceback" not in error
    if checkpoints:
        assert "the same command with --resume-from-checkpoint latest goes on; its checkpoints are in" in error
        assert run(home, "ddpm", out, *steps, "--resume-from-checkpoint", "latest") == 0
        assert run(home, "ddpm", tmp_path / "whole", *steps) == 0
        assert hashes(out) == hashes(tmp_path / "whole")
    else:
        assert error.endswith(
            "there is no checkpoint (--checkpointing-steps N writes some); the same command starts anew"
        )


def test_a_signal_outside_of_the_iterations(home: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def send(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Unlearner, "run", send)
    before = signal.getsignal(signal.SIGTERM)
    assert run(home, "ddpm", tmp_path / "out", *STEPS) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err and signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "out" / ".unlearn_ext.lock").exists()


def test_paths_with_the_home_folder_and_results_through_links(home: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "real.json")
    json_file = ("--json", "~/link")
    assert run(home, "ddpm", Path("~/out"), *STEPS, *json_file, "--dry-run") == 0
    plan = json.loads((tmp_path / "real.json").read_text())
    assert run(home, "ddpm", Path("~/out"), *STEPS, *json_file) == 0
    report = json.loads((tmp_path / "real.json").read_text())
    assert (tmp_path / "link").is_symlink() and plan != report == json.loads(
        (tmp_path / "out" / "unlearning" / "result.json").read_text()
    )
