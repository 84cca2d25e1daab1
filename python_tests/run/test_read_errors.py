"""Files that are there and cannot be opened: the system's reason, never "damaged" or "missing"."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import make
from helpers.runs import run
from safetensors.torch import save_file

from unlearn_ext import SaliencyMask, UnlearnError
from unlearn_ext.certified import DescentToDelete, Publication, SoftmaxRegression, certify
from unlearn_ext.data import latents, open_data
from unlearn_ext.evaluation import inception


@contextlib.contextmanager
def handles_left(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    handles = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                handles.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(count):
            os.close(handles.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for handle in handles:
            os.close(handle)


def mask(folder: Path) -> Callable[[], Any]:
    SaliencyMask.from_dict({"w": torch.ones(3, dtype=torch.bool)}).save(folder / "m.safetensors")
    return lambda: SaliencyMask.load(folder / "m.safetensors")


def mask_of_torch(folder: Path) -> Callable[[], Any]:
    torch.save({"w": torch.ones(3, dtype=torch.bool)}, folder / "m.pt")
    return lambda: SaliencyMask.from_pt(folder / "m.pt")


def inception_weights(folder: Path) -> Callable[[], Any]:
    torch.save({"w": torch.ones(3)}, folder / "w.pth")
    return lambda: inception._check_tensors(folder / "w.pth")


def arrays(folder: Path, suffix: str) -> Callable[[], Any]:
    images, labels = np.zeros((2, 2, 2), np.uint8), np.arange(2)
    path = folder / f"data.{suffix}"
    if suffix == "npz":
        np.savez(path, images=images, labels=labels)
    else:
        save_file({"images": torch.from_numpy(images), "labels": torch.from_numpy(labels)}, path)
    return lambda: open_data(path, size=2, channels=1, classes=2)[0]


def shards(folder: Path) -> Callable[[], Any]:
    part = torch.zeros(1, 1, 2, 2)
    tensors = {"indices": torch.zeros(1, dtype=torch.int64), "latent_mean": part, "latent_std": part.clone()}
    save_file(tensors, folder / "latents-00000.safetensors")
    return lambda: latents._read_shards(folder)


def certified(folder: Path, what: str) -> Callable[[], Any]:
    rows = torch.nn.functional.normalize(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    learner = certify(SoftmaxRegression(3, 2), rows, labels := torch.arange(40) % 2, iterations=25)
    if what == "secret":
        learner.save_secret(folder / "s.safetensors")
        return lambda: DescentToDelete.load_secret(folder / "s.safetensors", rows, labels)
    learner.publish().save(folder)
    return lambda: Publication.load(folder)


def resumed(folder: Path) -> Callable[[], Any]:
    run(make(), output_dir=folder, checkpointing_steps=4)
    return lambda: run(make(), output_dir=folder, resume_from_checkpoint="latest")


def fresh(folder: Path) -> Callable[[], Any]:
    return lambda: run(make(), output_dir=folder, changes={"iterations": 1})


READERS: dict[str, Callable[[Path], Callable[[], Any]]] = {
    "mask": mask,
    "mask of torch.save": mask_of_torch,
    "Inception": inception_weights,
    "npz": lambda folder: arrays(folder, "npz"),
    "safetensors": lambda folder: arrays(folder, "safetensors"),
    "latents": shards,
    "secret": lambda folder: certified(folder, "secret"),
    "publication": lambda folder: certified(folder, "publication"),
    "resumed run": resumed,
    "fresh run": fresh,
}


@pytest.mark.parametrize("make_reader", READERS.values(), ids=READERS.keys())
def test_too_many_open_files_are_named(make_reader: Callable[[Path], Callable[[], Any]], tmp_path: Path) -> None:
    read = make_reader(tmp_path)
    read()  # what is imported when it is needed is there now
    refused = 0
    for count in range(4):
        with handles_left(count):
            try:
                read()
            except UnlearnError as error:
                caught = str(error)
            else:
                continue
        refused += 1
        assert "Too many open files" in caught and "\n" not in caught
        assert not any(word in caught for word in ("damaged", "is not a", "is missing", "no such", "another copy")), (
            caught
        )
    assert refused
    read()
