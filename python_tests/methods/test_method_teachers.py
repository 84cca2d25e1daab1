"""Methods that compare with other networks: frozen teachers, random ones, and checkpoints that hold them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from helpers.method_runs import run, same
from helpers.models import ConvNet, batches, make
from torch import nn

from unlearn_ext import InputError, Unlearner
from unlearn_ext.methods import (
    BadTeacher,
    Finetune,
)
from unlearn_ext.tasks import Classification, Task


def test_a_teacher_is_frozen_and_costs_no_random_number() -> None:
    """With dropout in the model, a teacher that drew would change what the model draws."""
    task, batch = Classification(), batches(1, 6, seed=1)[0]
    model = make(dropout=0.5).train()
    teacher = copy.deepcopy(model).eval()
    prepared = task.prepare(batch, torch.device("cpu"))
    torch.manual_seed(3)
    losses, distances = task.losses_and_distances(model, teacher, prepared, temperature=2.0)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(losses, task.losses(model, prepared)) and torch.equal(after, torch.rand(1))
    distances.mean().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert teacher.norm.num_batches_tracked == 0
    assert task.losses_and_distances(teacher, teacher, prepared)[1].abs().max() == 0


def test_a_random_teacher_is_given_or_drawn_by_its_modules() -> None:
    class Own(ConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return super().forward(x) * self.scale

    torch.manual_seed(0)
    with pytest.raises(InputError, match=r"the model itself \(a Own\) has no reset_parameters to draw them: pass rand"):
        Unlearner(Own(), Classification(), BadTeacher())
    run(Own(), "bad_teacher", changes={"random_model": Own()})
    drawn = [make() for _ in range(3)]
    for model, seed in zip(drawn, (0, 0, 1), strict=True):
        torch.manual_seed(int(model.head.weight.sum() * 0))  # the global generator has no say
        run(model, "bad_teacher", changes={"seed": seed})
        torch.rand(7)
    assert same(drawn[0], drawn[1]) and not same(drawn[0], drawn[2])


@dataclass(kw_only=True)
class Elsewhere(Finetune):
    """Another package's, without Bad Teacher's arguments."""

    name: ClassVar[str] = "elsewhere"
    retain_teacher: ClassVar[str | None] = "random"

    def retain_loss(self, losses, iteration, distances):
        return distances.mean()


def test_a_method_of_another_package_has_teachers() -> None:
    model, again = make(), make()
    for net in (model, again):
        Unlearner(net, Classification(), Elsewhere(iterations=3)).run(retain=batches(5, 6, seed=2))
    assert same(model, again) and not same(model, make())

    class NoDraw(ConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

    with pytest.raises(InputError, match=r"elsewhere compares with a network of random .* to draw them: give"):
        Unlearner(NoDraw(), Classification(), Elsewhere())

    class Misspelt(Elsewhere):
        retain_teacher = "orignal"

    with pytest.raises(InputError, match="elsewhere compares with a network called 'orignal', which is not known"):
        Unlearner(make(), Classification(), Misspelt())


def test_a_given_random_teacher_is_asked_for_again(tmp_path) -> None:
    run(make(), "bad_teacher", changes={"random_model": make(seed=8)}, output_dir=tmp_path, checkpointing_steps=6)
    with pytest.raises(InputError, match="written with random_model="):
        run(
            make(),
            "bad_teacher",
            changes={"random_model": make(seed=9)},
            output_dir=tmp_path,
            resume_from_checkpoint="latest",
        )


def test_a_checkpoint_without_its_teacher_is_damaged(tmp_path) -> None:
    run(make(), "scrub", output_dir=tmp_path, checkpointing_steps=6)
    file = tmp_path / "checkpoint-12" / "teacher.safetensors"
    assert file.is_file()
    file.unlink()
    model = make(seed=4)
    with pytest.raises(InputError, match=r"checkpoint-12 is damaged: its teacher\.safetensors is missing"):
        run(model, "scrub", output_dir=tmp_path, resume_from_checkpoint=file.parent)
    assert same(model, make(seed=4))


def test_a_task_that_measures_no_distance_is_refused() -> None:
    class Own(Classification):
        losses_and_distances = Task.losses_and_distances

    with pytest.raises(
        InputError, match="Own measures no distance to another network: choose a method that needs none"
    ):
        Unlearner(make(), Own(), "scrub")
