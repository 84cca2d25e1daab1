"""A run that is over goes on for more iterations, or says why not."""

from __future__ import annotations

import pytest
import torch
from helpers.models import batches, make
from helpers.runs import identical, loaders, method, weights

from unlearn_ext import InputError, Unlearner
from unlearn_ext.methods import parse
from unlearn_ext.tasks import Classification

CONSTANT = {"lr_schedule": "constant", "forget_schedule": "constant"}


def trained(settings, directory=None, data=None, **arguments):
    model = make(dropout=0.3)
    torch.manual_seed(7)
    unlearner = Unlearner(model, Classification(), settings, ema_decay=0.9)
    result = unlearner.run(**(data or loaders()), output_dir=directory, **arguments)
    return weights(model), result


def test_a_finished_run_goes_on(tmp_path) -> None:
    expected, whole = trained(method(iterations=20, **CONSTANT))
    trained(method(iterations=12, **CONSTANT), tmp_path, checkpointing_steps=6)
    found, result = trained(method(iterations=20, **CONSTANT), tmp_path, resume_from_checkpoint="latest")
    assert identical(expected, found) and result.history == whole.history and identical(result.ema, whole.ema)


def test_a_shorter_end(tmp_path) -> None:
    expected, _ = trained(method(iterations=9, **CONSTANT))
    trained(method(iterations=12, **CONSTANT), tmp_path, checkpointing_steps=6)
    shorter = {"resume_from_checkpoint": tmp_path / "checkpoint-6"}
    assert identical(expected, trained(method(iterations=9, **CONSTANT), tmp_path, **shorter)[0])
    with pytest.raises(InputError, match=r"checkpoint-12 is of iteration 12, and the method makes 9: raise iterations"):
        trained(method(iterations=9, **CONSTANT), tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-12")


@pytest.mark.parametrize("schedule", ["lr_schedule", "forget_schedule"])
def test_a_schedule_over_the_whole_run_forbids_it(schedule, tmp_path) -> None:
    settings = {**CONSTANT, schedule: "cosine"}
    trained(method(iterations=12, **settings), tmp_path, checkpointing_steps=6)
    message = rf"written with iterations=12 and the method has 20, and its rates depend on .*{schedule}='cosine'"
    with pytest.raises(InputError, match=message):
        trained(method(iterations=20, **settings), tmp_path, resume_from_checkpoint="latest")


def test_a_strength_that_falls_without_a_schedule_forbids_it(tmp_path) -> None:
    data = {"forget": batches(2, 6, seed=1), "retain": batches(3, 6, seed=2), "unseen": batches(2, 6, seed=3)}
    settings = parse("nabla_tau:iterations=4")
    trained(settings, tmp_path, data, checkpointing_steps=2)
    with pytest.raises(InputError, match="its rates depend on how many there are"):
        trained(parse("nabla_tau:iterations=6"), tmp_path, data, resume_from_checkpoint="latest")


def test_more_epochs(tmp_path) -> None:
    settings = "finetune:lr=0.1,epochs="
    data = {"retain": batches(3, 6, seed=2)}
    expected, _ = trained(parse(settings + "4"), data=data)
    trained(parse(settings + "2"), tmp_path, data, checkpointing_steps=3)
    found, _ = trained(parse(settings + "4"), tmp_path, data, resume_from_checkpoint="latest")
    assert identical(expected, found)


def test_a_stopped_run_goes_on_where_it_is_made_longer(tmp_path) -> None:
    stopping = {"evaluate": lambda model, step: step == 6, "evaluate_every": 6, "checkpointing_steps": 6}
    trained(method(iterations=12, **CONSTANT), tmp_path, **stopping)
    _, same = trained(method(iterations=12, **CONSTANT), tmp_path, resume_from_checkpoint="latest")
    assert same.stopped_at == 6
    found, longer = trained(method(iterations=13, **CONSTANT), tmp_path, resume_from_checkpoint="latest")
    assert longer.stopped_at is None and identical(found, trained(method(iterations=13, **CONSTANT))[0])


def test_other_settings_are_refused_all_the_same(tmp_path) -> None:
    trained(method(iterations=12, **CONSTANT), tmp_path, checkpointing_steps=6)
    with pytest.raises(InputError, match=r"written with lr=0\.02 and this run has 0\.5"):
        trained(method(iterations=20, lr=0.5, **CONSTANT), tmp_path, resume_from_checkpoint="latest")
