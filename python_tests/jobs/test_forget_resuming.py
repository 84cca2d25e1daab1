"""What ``unlearn-ext forget`` takes from an earlier run: its mask, its checkpoints, and a result half moved."""

from __future__ import annotations

import ast
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from helpers.forgetting import SHORT, SMALL, Killed, hashes, result, run, run_killed_at, unless_in, work
from helpers.pipelines import save_ddpm_pipeline

from unlearn_ext.cli import main
from unlearn_ext.data import _folders
from unlearn_ext.jobs import opening
from unlearn_ext.saliency import SaliencyMask
from unlearn_ext.utils.leftovers import partial_name

# --- Masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_mask_is_reused_and_refused_where_it_does_not_belong(home: Path, tmp_path: Path, capsys) -> None:
    assert run(home, "ddpm", tmp_path / "first", "--forget-class", "3") == 0
    mask = str(tmp_path / "first" / "unlearning" / "mask.safetensors")
    assert run(home, "ddpm", tmp_path / "x", "--forget-class", "3", "--mask", mask) == 1
    assert "leave one of them out" in capsys.readouterr().err
    own = ["--pretrained-model-name-or-path", str(home / "ddpm"), "--data", str(home / "digits"), "--mask", mask]
    assert main(["forget", *own, *SHORT, "--output-dir", str(tmp_path / "second"), "--forget-class", "3"]) == 0
    assert result(tmp_path / "second")["mask_density"] == result(tmp_path / "first")["mask_density"]
    assert "fisher" not in result(tmp_path / "second")["seconds"]
    capsys.readouterr()
    save_ddpm_pipeline(tmp_path / "other", seed=1)
    shutil.copytree(home / "digits", tmp_path / "more")
    shutil.copy(tmp_path / "more" / "3" / "000.png", tmp_path / "more" / "3" / "more.png")
    for model, data, forgotten, words in (
        (home / "ddpm", home / "digits", "4", "was made for another forget set (forget_classes"),
        (home / "ddpm", tmp_path / "more", "3", "was made for another forget set (forget_data"),
        (tmp_path / "other", home / "digits", "3", "was made for other weights"),
    ):
        own = ["--pretrained-model-name-or-path", str(model), "--data", str(data), "--mask", mask, *SHORT]
        for more in ([], ["--dry-run"]):
            assert main(["forget", *own, "--output-dir", str(tmp_path / "x"), "--forget-class", forgotten, *more]) == 1
            error = capsys.readouterr().err
            assert words in error and error.endswith("leave it out and a new one is measured\n")
            assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize("unsaid", ["forget_classes", "forget_data", "weights_hash"])
def test_a_mask_that_does_not_say_what_it_was_made_for(home: Path, tmp_path: Path, capsys, unsaid: str) -> None:
    """As one that was made in Python: the user can say it."""
    assert run(home, "ddpm", tmp_path / "first", "--forget-class", "3") == 0
    mask = SaliencyMask.load(tmp_path / "first" / "unlearning" / "mask.safetensors")
    said = mask.metadata.pop(unsaid)
    mask.save(tmp_path / "mask.safetensors")
    own = ["--pretrained-model-name-or-path", str(home / "ddpm"), "--data", str(home / "digits"), *SHORT]
    own += ["--mask", str(tmp_path / "mask.safetensors"), "--forget-class", "3", "--output-dir", str(tmp_path / "out")]
    capsys.readouterr()
    assert main(["forget", *own]) == 1
    error = capsys.readouterr().err
    assert "does not say what it was made for" in error and not (tmp_path / "out").exists()
    words = ast.literal_eval(error.rpartition("metadata.update(")[2].rstrip(")\n"))
    assert words == {unsaid: said}
    mask.metadata.update(words)
    mask.save(tmp_path / "mask.safetensors")
    assert main(["forget", *own]) == 0


# --- Checkpoints and results ----------------------------------------------------------------------------------------


def test_a_killed_run_is_resumed_to_the_same_weights(home: Path, tmp_path: Path, monkeypatch) -> None:
    steps = ("--forget-class", "3", "--max-train-steps", "4", "--checkpointing-steps", "2")
    steps += ("--save-weights", "ema", "--ema-decay", "0.5")
    assert run(home, "dit", tmp_path / "whole", *steps) == 0
    run_killed_at(3, monkeypatch, home, "dit", tmp_path / "cut", *steps)
    assert not (tmp_path / "cut" / "model_index.json").exists()
    assert run(home, "dit", tmp_path / "cut", *steps, "--resume-from-checkpoint", "latest", "--keep-work") == 0
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")
    assert (work(tmp_path / "cut") / "checkpoint-4").is_dir()


def kill_in_move(home: Path, out: Path, monkeypatch, *, at: int, after: bool = False) -> list[str]:
    """Runs until the ``at``-th entry is to be moved, or was; returns the names in the order of moving."""
    moved, replace = [], os.replace

    def die(source, target):
        final = Path(target).parent == out
        if final:
            moved.append(Path(target).name)
        if len(moved) == at and final and not after:
            raise Killed
        replace(source, target)
        if len(moved) == at and final:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(Killed):
            run(home, "ddpm", out, "--forget-class", "3", "--checkpointing-steps", "2")
    return moved


def test_checkpoints_are_not_run_over(home: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    run_killed_at(1, monkeypatch, home, "ddpm", tmp_path / "out", "--forget-class", "3", "--checkpointing-steps", "1")
    capsys.readouterr()
    monkeypatch.setattr(opening, "open_pretrained", None)  # refused before anything is opened
    for more in ((), ("--dry-run",)):
        assert run(home, "ddpm", tmp_path / "out", "--forget-class", "3", *more) == 1
        assert "add --resume-from-checkpoint latest" in capsys.readouterr().err


@pytest.mark.slow
def test_a_result_half_moved_is_moved_by_the_next_run(home: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    steps = ("--forget-class", "3", "--checkpointing-steps", "2")
    assert run(home, "ddpm", tmp_path / "whole", *steps) == 0
    out = tmp_path / "cut"
    _, second = kill_in_move(home, out, monkeypatch, at=2)
    (out / second).mkdir()
    (out / second / "mine.txt").write_text("mine")
    (out / "note.txt").write_text("mine")
    there = sorted(str(path) for path in out.rglob("*"))
    for _ in range(2):
        capsys.readouterr()
        assert run(home, "ddpm", out, *steps) == 1
        assert f"holds {second}, where the result in" in capsys.readouterr().err
        assert sorted(str(path) for path in out.rglob("*")) == there
    (out / second).rename(tmp_path / "away")
    assert run(home, "ddpm", out, *steps, "--resume-from-checkpoint", "latest") == 1
    assert "its model is whole now" in capsys.readouterr().err
    assert (out / "note.txt").read_text() == (tmp_path / "away" / "mine.txt").read_text() == "mine"
    (out / "note.txt").unlink()
    assert hashes(out) == hashes(tmp_path / "whole")
    assert not (out / "unlearning" / "folder").exists()
    assert run(home, "ddpm", out, *steps) == 1
    assert "already: choose an empty folder" in capsys.readouterr().err
    assert hashes(out) == hashes(tmp_path / "whole")


def test_a_run_killed_after_its_last_move_keeps_its_result(home: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "cut"
    entries = len(list((home / "ddpm").iterdir()))
    assert kill_in_move(home, out, monkeypatch, at=entries, after=True)[-1] == "model_index.json"
    before = hashes(out)
    assert before.keys() == hashes(home / "ddpm").keys()
    for sentence in ("its model is whole now", "already: choose an empty folder"):
        assert run(home, "ddpm", out, "--forget-class", "3") == 1
        assert sentence in capsys.readouterr().err
        assert hashes(out) == before


def test_what_a_killed_run_was_writing_goes_only_when_a_run_takes_the_folder(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    left = out / "unlearning" / partial_name("folder")
    left.mkdir(parents=True)
    (left / "part").write_text("half")
    (out / ".folder-mine").mkdir()
    assert run(home, "ddpm", out, "--forget-class", "3") == 1
    assert (left / "part").exists() and (out / ".folder-mine").exists()
    (out / ".folder-mine").rmdir()
    assert run(home, "ddpm", out, "--forget-class", "3") == 0
    assert not left.exists()


def test_a_checkpoint_of_another_forget_set_is_not_resumed(home, tmp_path, capsys, monkeypatch) -> None:
    steps = ("--max-train-steps", "2", "--checkpointing-steps", "1")
    run_killed_at(1, monkeypatch, home, "ddpm", tmp_path / "out", "--forget-class", "3", *steps)
    capsys.readouterr()
    for more in ([], ["--dry-run"]):
        with monkeypatch.context() as patch:  # known before a picture is decoded
            patch.setattr(_folders.Folders, "_decode", lambda self, index: pytest.fail("an image was decoded"))
            again = ["--forget-class", "4", *steps, "--resume-from-checkpoint", "latest", *more]
            assert run(home, "ddpm", tmp_path / "out", *again) == 1
    assert "forget_classes='3'" in capsys.readouterr().err


def test_a_checkpoint_of_other_starting_weights_is_not_resumed(home, tmp_path, capsys, monkeypatch) -> None:
    other = save_ddpm_pipeline(tmp_path / "other", seed=5)
    steps = ("--forget-class", "3", "--max-train-steps", "2", "--checkpointing-steps", "1")
    run_killed_at(1, monkeypatch, home, "ddpm", tmp_path / "out", *steps)
    own = ["--pretrained-model-name-or-path", str(other), "--data", str(home / "digits"), *unless_in(steps, SMALL)]
    capsys.readouterr()
    out = ["--output-dir", str(tmp_path / "out"), "--resume-from-checkpoint", "latest"]
    assert main(["forget", *own, *steps, *out]) == 1
    assert "was written with starting_weights=" in capsys.readouterr().err
