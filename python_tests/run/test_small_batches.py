"""Batches that leave batch normalisation one sample are refused before the first step, where it refuses that."""

from __future__ import annotations

import pytest
import torch
from helpers.models import ConvNet, make
from helpers.runs import identical, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from unlearn_ext import InputError, Unlearner
from unlearn_ext.distributed.ranks import Ranks
from unlearn_ext.methods import parse
from unlearn_ext.run.small_batches import SmallBatches
from unlearn_ext.tasks import Classification

LAST = r"the last {} batch has one sample, which BatchNorm refuses in train mode: use drop_last=True"


class Flat(nn.Module):
    """Batch normalisation of vectors."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.first(x))))


class Pooled(ConvNet):
    """Batch normalisation of images of one pixel."""

    def forward(self, x):
        return self.head(self.norm(self.conv(x).mean(dim=(2, 3), keepdim=True)).flatten(1))


def samples(count: int, seed: int, shape=(4,)) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, *shape, generator=generator), torch.arange(count) % 3)


def loader(count: int, size: int, seed: int, shape=(4,), **arguments) -> DataLoader:
    return DataLoader(samples(count, seed, shape), batch_size=size, **arguments)


def run(model: nn.Module, spec: str = "sfron:gamma=none", shape=(4,), **sets) -> None:
    data = {"forget": loader(6, 3, 1, shape), "retain": loader(9, 3, 2, shape), **sets}
    spec += f"{',' if ':' in spec else ':'}iterations=2,lr=0.01"
    Unlearner(model, Classification(), parse(spec)).run(**data)


@pytest.mark.parametrize("spec", ["sfron:gamma=0", "sfron:gamma=none", "sfron:gamma=0,fisher_batches=1"])
@pytest.mark.parametrize("name", ["forget", "retain"])
def test_the_last_batch_of_one_sample(spec, name) -> None:
    model = make(Flat)
    torch.manual_seed(5)
    with pytest.raises(InputError, match=LAST.format(name)):
        run(model, spec, **{name: loader(7, 3, 3, shuffle=True)})
    assert identical(weights(model), weights(make(Flat))) and not any(p.grad is not None for p in model.parameters())
    run(model, spec, **{name: loader(7, 3, 3, drop_last=True)})
    run(model, f"{spec},freeze_batch_norm=true", **{name: loader(7, 3, 3)})


def test_the_learn_set_too() -> None:
    with pytest.raises(InputError, match=LAST.format("learn")):
        run(make(Flat), "ug_clu", learn=loader(4, 3, 3))


def test_other_places() -> None:
    single = list(loader(1, 1, 7))
    some = list(loader(9, 3, 2))
    for retain, words in (
        (some + single, LAST.format("retain")),
        ([some[0], *single, some[1]], r"batch 1 of the retain set has one sample.*use a larger batch_size"),
        (loader(6, 1, 2), r"batch 0 of the retain set has one sample.*use a larger batch_size"),
        (single, r"batch 0 of the retain set has one sample"),
    ):
        with pytest.raises(InputError, match=words):
            run(make(Flat), retain=retain)


def test_what_is_not_trained_on_may_be_small() -> None:
    run(make(Flat), "nabla_tau", unseen=loader(4, 3, 3))
    run(make(Flat), "finetune:freeze_batch_norm=true", retain=loader(7, 3, 3))
    run(make(Flat), "gradient_ascent", forget=loader(7, 3, 3), retain=None)  # its norms are frozen


def test_models_that_take_one_sample() -> None:
    run(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)), retain=loader(7, 3, 3))
    shape = (2, 5, 5)
    run(make(), shape=shape, retain=loader(7, 3, 3, shape))  # 25 pixels of one image
    with pytest.raises(InputError, match=LAST.format("retain")):
        run(make(Pooled), shape=shape, retain=loader(7, 3, 3, shape))
    frozen = make(Flat).train()
    frozen.norm.eval()
    run(frozen, retain=loader(7, 3, 3))
    assert frozen.training and not frozen.norm.training


def test_the_trial_moves_nothing(monkeypatch) -> None:
    """A run whose last batch has one sample, which its model takes, with a trial of that and without."""
    shape, tried = (2, 5, 5), []

    def trained() -> dict[str, torch.Tensor]:
        model = make(ConvNet, dropout=0.5).eval()
        torch.manual_seed(9)
        run(model, shape=shape, retain=loader(7, 3, 3, shape, shuffle=True))
        return weights(model)

    trial = SmallBatches._is_refused
    monkeypatch.setattr(SmallBatches, "_is_refused", lambda self, batch: tried.append(1) or trial(self, batch))
    with_it = trained()
    monkeypatch.setattr(SmallBatches, "find", lambda self, name, batch, size: None)
    assert identical(with_it, trained()) and tried == [1]


@pytest.mark.parametrize(
    ("size", "ranks", "shared", "words"),
    [
        (3, 2, True, r"set has 3 samples for 2 ranks, which leaves one of them a single one.*SyncBatchNorm, or freeze"),
        (1, 2, True, r"set has one sample"),
        (2, 4, True, r"set has 2 samples for 4 ranks"),
        (4, 2, True, None),
        (3, 2, False, None),
        (1, 2, False, r"set has one sample"),
    ],
)
def test_a_ranks_part_counts(size, ranks, shared, words) -> None:
    """A batch that the ranks share is cut; loaders of their own give each a whole one."""
    batch = next(iter(loader(size, size, 3)))
    check = SmallBatches(
        make(Flat), Classification(), parse("finetune"), {"retain": [batch]}, Ranks(ranks, 0), split_batches=shared
    )
    found = check.find("retain", batch, size)
    assert (found is None) == (words is None)
    if words is not None:
        with pytest.raises(InputError, match=words):
            raise found
