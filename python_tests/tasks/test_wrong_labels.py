"""Wrong labels: drawn once for each sample, whatever its batch, place, rank or device."""

from __future__ import annotations

import pytest
import torch
from helpers.models import make, samples
from torch import Tensor, nn

from unlearn_ext import InputError, Unlearner
from unlearn_ext.distributed.batches import own_part
from unlearn_ext.distributed.ranks import Ranks
from unlearn_ext.methods import parse
from unlearn_ext.tasks import Classification

CPU = torch.device("cpu")


def drawn(batch, seed: int = 0, classes: int = 4, part: Ranks | None = None) -> Tensor:
    """The labels that a batch's replacement losses are taken under."""
    found: list[Tensor] = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        found.append(labels)
        return logits.sum(1)

    task, net = Classification(loss, seed=seed), make(classes=classes).to(batch[0].dtype)
    task.begin(net, batch)
    prepared = task.prepare(batch, CPU)
    if part is not None:
        prepared, _ = own_part(prepared, len(batch[1]), part)
    task.replacement_losses(net, prepared)
    return found[-1]


def test_labels_are_wrong_and_evenly_drawn() -> None:
    images, labels = samples(6000, seed=1)
    wrong = drawn((images, labels))
    assert not (wrong == labels).any() and wrong.min() >= 0 and wrong.max() < 4
    counts = torch.bincount(labels * 4 + wrong, minlength=16).view(4, 4).double()
    expected = counts.sum(1, keepdim=True) / 3
    chi2 = ((counts - expected) ** 2 / expected)[~torch.eye(4, dtype=torch.bool)].sum()
    assert chi2 < 26.1  # 8 degrees of freedom, p = 0.001
    other = drawn((images, labels), seed=1)
    assert 0.3 < (other == wrong).double().mean() < 0.37


def test_every_number_of_a_sample_has_its_part() -> None:
    """Images that are black but for one pixel, each in another place."""
    images = torch.eye(50).view(50, 2, 5, 5)
    counts = torch.bincount(drawn((images, torch.zeros(50, dtype=torch.int64))), minlength=4)
    assert counts[0] == 0 and counts[1:].min() >= 8


def test_a_sample_keeps_its_label_in_any_order_batch_and_part() -> None:
    images, labels = samples(40, seed=2)
    wrong = drawn((images, labels))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn((images[order], labels[order])), wrong[order])
    assert torch.equal(torch.cat([drawn((images[i : i + 7], labels[i : i + 7])) for i in range(0, 40, 7)]), wrong)
    parts = [drawn((images, labels), part=Ranks(rank=rank, size=3)) for rank in range(3)]
    assert torch.equal(torch.cat(parts), wrong)
    assert torch.equal(drawn((images.to(memory_format=torch.channels_last), labels)), wrong)


def test_a_batch_may_give_them() -> None:
    images, labels = samples(5, seed=3)
    net, task = make(), Classification()
    batch = {"pixel_values": images, "labels": labels, "replace_labels": (labels + 1) % 4}
    task.begin(net, batch)
    got = task.replacement_losses(net, task.prepare(batch, CPU))
    expected = nn.functional.cross_entropy(net(images), (labels + 1) % 4, reduction="none")
    assert torch.equal(got, expected)
    with pytest.raises(InputError, match="label 4 is outside the model's 4 classes"):
        task.check({**batch, "replace_labels": torch.full((5,), 4)})
    with pytest.raises(InputError, match=r"replace_labels: expected integers of shape \[5\], got torch.float32"):
        task.check({**batch, "replace_labels": torch.zeros(5)})


def test_labels_that_have_no_wrong_one() -> None:
    images, labels = samples(5, seed=3)
    task = Classification(lambda logits, soft: -(logits * soft).sum(1))
    soft = nn.functional.one_hot(labels, 4).float()
    data = {"forget": [(images, soft)], "retain": [(images + 1, soft)]}
    net = make()
    with pytest.raises(InputError, match=r"Classification has no replacement.*make batches dicts with replace_labels"):
        Unlearner(net, task, parse("random_label:iterations=2")).run(**data)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), make().parameters(), strict=True))
