"""Loaders that an evaluation looks at while a run iterates them."""

from __future__ import annotations

import pytest
import torch
from helpers.runs import identical
from helpers.streams import COUNT, SIZE, dataset, loader, trained
from torch.utils.data import DataLoader, IterableDataset

from unlearn_ext import InputError

PASS = COUNT // SIZE


def with_workers(persistent: bool) -> DataLoader:
    return loader(shuffle=True, num_workers=1, persistent_workers=persistent)


@pytest.mark.slow
@pytest.mark.process
def test_workers_that_live_on(tmp_path) -> None:
    expected, _ = trained(with_workers(True))
    retain, counts = with_workers(True), []

    def look(model, step):
        counts.append(sum(1 for _ in retain))
        next(iter(retain))  # and leaves a pass half-way

    with pytest.warns(UserWarning, match="workers of the retain loader live on .* persistent_workers=False"):
        found, _ = trained(retain, evaluate=look, evaluate_every=4, output_dir=tmp_path, checkpointing_steps=9)
    assert identical(expected, found) and set(counts) == {PASS}
    with pytest.warns(UserWarning, match="live on .* was not restored"):
        again, result = trained(retain, output_dir=tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-9")
    assert identical(expected, again) and "was not restored" in result.warnings["workers"]


@pytest.mark.slow
@pytest.mark.process
def test_workers_of_accelerate_that_live_on() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    expected, _ = trained(accelerator.prepare(with_workers(True)))
    retain = accelerator.prepare(with_workers(True))
    found, _ = trained(retain, evaluate=lambda model, step: {"n": sum(1 for _ in retain)}, evaluate_every=4)
    assert identical(expected, found)


class OneAtATime:
    """A loader whose passes share a place, which is no number that would be put back."""

    def __init__(self, sized: bool = True):
        self.batches, self.place = list(loader()), [0]
        self.dataset = Growing() if not sized else None

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        self.place[0] = 0
        while self.place[0] < len(self.batches):
            self.place[0] += 1
            yield self.batches[self.place[0] - 1]


class Growing(IterableDataset):
    def __iter__(self):
        return iter(())


def test_a_loader_with_one_pass_at_a_time_is_refused() -> None:
    retain = OneAtATime()
    trained(retain)
    message = r"ended after 4 of 6 batches: either evaluate.* looked at the same loader.* of its own; or its len\(\)"
    with pytest.raises(InputError, match=message):
        trained(retain, evaluate=lambda model, step: {"n": len(list(retain))}, evaluate_every=4)
    trained(retain, evaluate=lambda model, step: {"n": len(list(loader()))}, evaluate_every=4)


def test_a_pass_that_a_look_sets_back_is_refused() -> None:
    """It would go on for ever with the first batches."""
    retain = OneAtATime()
    message = "started again in the midst of 6 batches: either evaluate.* looked at the same loader"
    with pytest.raises(InputError, match=message):
        trained(retain, evaluate=lambda model, step: {"n": len(next(iter(retain)))}, evaluate_every=4)


class Guessed(IterableDataset):
    def __len__(self) -> int:
        return PASS + 3

    def __iter__(self):
        return iter(list(loader()))


def test_data_of_a_length_that_is_a_guess_may_end_early() -> None:
    for retain in (OneAtATime(sized=False), Guessed()):
        trained(retain, evaluate=lambda model, step, retain=retain: {"n": len(list(retain))}, evaluate_every=4)


SEEDABLE = [True, False]


@pytest.mark.parametrize("seedable", SEEDABLE, ids=["seedable", "plain"])
@pytest.mark.parametrize("used", [0, 1, 4])
def test_a_run_on_accelerates_loaders_resumes(seedable, used, tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.utils import DataLoaderConfiguration

    configuration = DataLoaderConfiguration(use_seedable_sampler=seedable)
    accelerator = accelerate.Accelerator(cpu=True, dataloader_config=configuration)

    def prepared(seed: int, passes: int = 0):
        torch.manual_seed(seed)
        retain = accelerator.prepare(DataLoader(dataset(), batch_size=SIZE, shuffle=True))
        for _ in range(passes):
            list(retain)
        return retain

    whole, _ = trained(prepared(1), output_dir=tmp_path, checkpointing_steps=5)
    for at in (5, 10):  # a new process has another seed when it prepares
        resume = {"output_dir": tmp_path, "resume_from_checkpoint": tmp_path / f"checkpoint-{at}"}
        again, _ = trained(prepared(2, used), **resume)
        assert identical(whole, again)
    retain = prepared(1)
    looked, _ = trained(retain, evaluate=lambda model, step: {"n": len(list(retain))}, evaluate_every=4)
    assert identical(whole, looked)
