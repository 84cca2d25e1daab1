"""Disks that are full, files that may not grow, handles that have run out, folders that go: one sentence each."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.models import make
from helpers.runs import run

from unlearn_ext import SaliencyMask, UnlearnError
from unlearn_ext.errors import WriteError


@contextlib.contextmanager
def limit(kind: int, value: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def failing(words: str, folder: Path, at: int, act, **arguments) -> None:
    """A run that ends in one sentence after ``act`` was called at iteration ``at``."""

    def call(model, step: int) -> None:
        if step == at:
            act()

    with pytest.raises(WriteError, match=words) as caught:
        run(make(), output_dir=folder, evaluate=call, evaluate_every=1, **arguments)
    assert isinstance(caught.value, UnlearnError) and isinstance(caught.value, OSError)
    assert "\n" not in str(caught.value) and "check the disk's space, the folder and its permissions" in str(
        caught.value
    )


def test_no_space_for_the_history(tmp_path: Path) -> None:
    def fill() -> None:
        (tmp_path / "history.jsonl").unlink()
        (tmp_path / "history.jsonl").symlink_to("/dev/full")

    failing(r"history\.jsonl cannot be written \(No space left on device\)", tmp_path, 3, fill)


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """EFBIG, in mid-writing of a checkpoint: the ones before stay, and nothing is left of it."""
    with contextlib.ExitStack() as stack:
        failing(
            r"checkpoint-4.* cannot be written \(.*File too large.*\)",
            tmp_path,
            4,
            lambda: stack.enter_context(limit(resource.RLIMIT_FSIZE, 2000)),
            checkpointing_steps=2,
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "history.jsonl"]
    assert len(run(make(), output_dir=tmp_path, resume_from_checkpoint="latest").history) == 12


def test_no_handles_left(tmp_path: Path) -> None:
    """EMFILE."""
    with contextlib.ExitStack() as stack:
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        kept = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
        stack.callback(lambda: [os.close(handle) for handle in kept])
        failing(
            r"cannot be written \(Too many open files\)",
            tmp_path,
            3,
            lambda: stack.enter_context(limit(resource.RLIMIT_NOFILE, min(highest, *kept))),
        )


@pytest.mark.parametrize("steps, words", [(None, r"history\.jsonl"), (4, r"history\.jsonl")])
def test_the_folder_goes_in_mid_run(steps: int | None, words: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = rf"({words}) cannot be written \(No such file or directory\)"
    failing(words, out, 4, lambda: shutil.rmtree(out), checkpointing_steps=steps)
    assert not out.exists()


def test_the_folder_goes_before_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = r"checkpoint-4 cannot be written \(No such file or directory\)"
    failing(words, out, 4, lambda: shutil.rmtree(out), checkpointing_steps=4, log_every=100)


def test_results_and_masks(tmp_path: Path) -> None:
    mask = run(make(), changes={"iterations": 1}).mask
    with limit(resource.RLIMIT_FSIZE, 10), pytest.raises(WriteError, match=r"mask\.safetensors cannot be written"):
        mask.save(tmp_path / "mask.safetensors")
    assert not list(tmp_path.iterdir())
    mask.save(tmp_path / "mask.safetensors")
    with limit(resource.RLIMIT_FSIZE, 10), pytest.raises(WriteError):
        mask.save(tmp_path / "mask.safetensors")
    assert SaliencyMask.load(tmp_path / "mask.safetensors") == mask  # the one from before


def test_masks_of_torch(tmp_path: Path) -> None:
    mask = SaliencyMask.from_dict({"w": torch.ones(100_000, dtype=torch.bool)})
    with (
        limit(resource.RLIMIT_FSIZE, 2000),
        pytest.raises(WriteError, match=r"mask\.pt cannot be written .* check the"),
    ):
        mask.to_pt(tmp_path / "mask.pt")
    assert not list(tmp_path.iterdir())
    mask.to_pt(tmp_path / "mask.pt")
    assert SaliencyMask.from_pt(tmp_path / "mask.pt") == mask
