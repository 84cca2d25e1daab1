"""A task of one's own, by the three methods that have to be there, in everything that a run does with a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from unlearn_ext import FisherDiagonal, InputError, Unlearner
from unlearn_ext.distributed.batches import own_part
from unlearn_ext.distributed.ranks import Ranks
from unlearn_ext.methods import SSD, parse
from unlearn_ext.tasks import Classification, Task

COUNT = 18


class Prepared(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Raw:
    """What no part of the library has ever seen."""

    x: Tensor
    y: Tensor


class Regression(Task):
    """Raw batches are of one type and prepared ones of another, so that taking one for the other raises."""

    def inputs(self, batch: Raw) -> Tensor:
        assert type(batch) is Raw
        return batch.x

    def prepare(self, batch: Raw, device: torch.device) -> Any:
        assert type(batch) is Raw
        return Prepared(batch.x.to(device), batch.y.to(device))

    def losses(self, model: Any, batch: Prepared) -> Tensor:
        assert type(batch) is Prepared
        return nn.functional.cross_entropy(model(batch.x), batch.y, reduction="none")


class OfDicts(Regression):
    def inputs(self, batch: Raw) -> dict[str, Tensor]:
        return {"x": batch.x, "y": batch.y}


def batches(count: int, seed: int) -> list[Raw]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator)
    return [Raw(*parts) for parts in zip(x.split(6), (torch.arange(count) % 2).split(6), strict=True)]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def trained(task: Task, spec: str, to_batch=lambda raw: raw, **arguments: Any) -> tuple[nn.Module, Any]:
    model = net()
    method = parse(f"{spec},lr=0.1,iterations=3")
    sets = {"forget": batches(COUNT, 1), "retain": batches(30, 2)}
    if method.needs_unseen:
        sets["unseen"] = batches(COUNT, 3)
    sets = {name: [to_batch(batch) for batch in data] for name, data in sets.items()}
    return model, Unlearner(model, task, method, **arguments).run(**sets)


@pytest.mark.parametrize("task", [Regression, OfDicts])
@pytest.mark.parametrize(
    ("spec", "arguments"),
    [
        ("sfron:gamma=0.1", {}),
        ("sfron:gamma=none,forget_freq=2", {"gradient_accumulation_steps": 2}),
        ("sfron:mask_fraction=0.5,update=joint", {"gradient_accumulation_steps": 2}),
        ("sfron:gamma=none,forget_alpha=auto", {}),
        ("finetune:lr_schedule=cosine", {"ema_decay": 0.5}),
        ("nabla_tau:forget_freq=1", {}),
        ("sfron:gamma=0.1,forget_freq=1", {"optimizer_in_backward": True}),
    ],
)
def test_it_trains_as_classification_does(task, spec, arguments) -> None:
    model, result = trained(task(), spec, **arguments)
    expected, other = trained(Classification(), spec, lambda raw: (raw.x, raw.y), **arguments)
    assert torch.equal(model.weight, expected.weight) and not torch.equal(model.weight, net().weight)
    assert result.counts == other.counts


@pytest.mark.parametrize("task", [Regression, OfDicts])
def test_its_duplicates_are_found(task) -> None:
    forget, retain = batches(COUNT, 1), batches(30, 2)
    retain[2].x[3], retain[2].y[3] = forget[1].x[4], forget[1].y[4]
    with pytest.raises(InputError, match="sample 15 of the retain set is also in the forget set"):
        Unlearner(net(), task(), parse("sfron:iterations=1")).run(forget, retain)
    retain[2].y[3] += 1  # the same sample where inputs say nothing of labels
    if task is OfDicts:
        Unlearner(net(), task(), parse("sfron:iterations=1,gamma=none")).run(forget, retain)


def test_it_measures() -> None:
    for settings in ({}, {"per_sample": True}, {"per_sample": True, "chunk": 1}):
        found = FisherDiagonal(net(), Regression(), **settings).measure(batches(COUNT, 1))
        expected = FisherDiagonal(net(), Classification(), **settings).measure(
            [(batch.x, batch.y) for batch in batches(COUNT, 1)]
        )
        assert torch.equal(found.sums["weight"], expected.sums["weight"]) and found.count == expected.count
    assert SSD(alpha=1.1).run(net(), Regression(), batches(COUNT, 1), batches(30, 2)).counts["dampened"]


def test_a_ranks_part_of_a_named_tuple() -> None:
    raw = batches(6, 1)[0]
    part, count = own_part(Regression().prepare(raw, torch.device("cpu")), 6, Ranks(size=4, rank=1))
    assert type(part) is Prepared and count == 2 and torch.equal(part.x, raw.x[2:4]) and torch.equal(part.y, raw.y[2:4])


@pytest.mark.parametrize("wrong", [[1.0, 2.0], torch.tensor(1.0), {}, {"x": [1]}, None])
def test_inputs_that_are_no_samples(wrong) -> None:
    class Wrong(Regression):
        def inputs(self, batch):
            return wrong

    with pytest.raises(InputError, match=r"Wrong.inputs: expected a tensor, or a dict of tensors.*got "):
        Unlearner(net(), Wrong(), parse("finetune:iterations=1,lr=0.1")).run(None, batches(12, 1))


@pytest.mark.parametrize("spec", ["random_label:iterations=1", "bad_teacher:iterations=1", "sfron:forget_term=replace"])
def test_what_it_does_not_offer_is_refused(spec) -> None:
    with pytest.raises(InputError, match=r"Regression (has no replacement|measures no distance).*or give the task"):
        Unlearner(net(), Regression(), parse(spec))


WRONG = {
    "averaged": lambda losses: losses.mean(),
    "some": lambda losses: losses[:3],
    "a column": lambda losses: losses.unsqueeze(1),
    "integers": lambda losses: losses.long(),
    "a list": lambda losses: list(losses),
}
SPECS = ["gradient_ascent:iterations=2", "finetune:iterations=2", "sfron:gamma=0.1,iterations=2", "salun:iterations=2"]
SPECS += ["sfron:gamma=none,forget_alpha=auto,iterations=2", "random_label:iterations=2", "scrub:epochs=3"]


def with_distances(task: type[Task]) -> type[Task]:
    """A task that any method takes."""

    class Full(task):
        replacement_losses = task.losses

        def losses_and_distances(self, model, teacher, batch, **settings):
            return Regression.losses(self, model, batch), task.losses(self, model, batch)

    return Full


@pytest.mark.parametrize("form", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("spec", SPECS)
def test_losses_have_to_be_one_number_per_sample(spec, form) -> None:
    class Wrong(Regression):
        def losses(self, model, batch):
            return form(super().losses(model, batch))

    model, method = net(), parse(f"{spec},lr=0.1")
    sets = {"forget": batches(COUNT, 1), "retain": batches(30, 2), "unseen": batches(COUNT, 3)}
    for name, needed in (("forget", method.forgets), ("retain", method.retains), ("unseen", method.needs_unseen)):
        if not (needed or (name == "retain" and method.measures)):
            del sets[name]
    task, what = with_distances(Wrong), "loss"
    if spec.startswith("scrub"):  # whose losses are right
        task.losses, what = Regression.losses, "distance"
    with pytest.raises(InputError, match=f"the {what} returned .* for 6 samples: return one floating-point number per"):
        Unlearner(model, task(), method).run(**sets)
    assert torch.equal(model.weight, net().weight)


@pytest.mark.parametrize("form", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("settings", [{}, {"per_sample": True}, {"per_sample": True, "chunk": 1}])
def test_fisher_losses_too(settings, form) -> None:
    class Wrong(Regression):
        def fisher_losses(self, model, batch):
            return form(super().losses(model, batch))

    if settings and form is WRONG["some"]:
        form = WRONG["averaged"]  # of one sample there is no part
    with pytest.raises(InputError, match=r"the loss returned .* samples?: return one floating-point number per sample"):
        FisherDiagonal(net(), Wrong(), **settings).measure(batches(COUNT, 1))


@pytest.mark.parametrize("form", [lambda hits: hits.double().mean(), lambda hits: hits.long()])
def test_hits_too(form) -> None:
    class Wrong(Classification):
        def hits(self, model, batch):
            return form(super().hits(model, batch))

    with pytest.raises(InputError, match=r"the task's hits returned .* for 6 samples: return one bool per sample"):
        trained(Wrong(), "sfron:gamma=none,forget_alpha=auto,target_accuracy=0.5", lambda raw: (raw.x, raw.y))


@pytest.mark.parametrize("form", WRONG.values(), ids=WRONG.keys())
def test_a_loss_of_ones_own_too(form) -> None:
    loss = lambda logits, labels: form(nn.functional.cross_entropy(logits, labels, reduction="none"))  # noqa: E731
    with pytest.raises(InputError, match=r"the loss returned .* for 6 samples: return one floating-point number per"):
        trained(Classification(loss=loss), "finetune:lr_schedule=cosine", lambda raw: (raw.x, raw.y))
