"""Loaders that keep random numbers, epochs and places of their own, as several test files need them."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
)

from unlearn_ext import Unlearner
from unlearn_ext.methods import parse
from unlearn_ext.tasks import Classification

COUNT, SIZE = 24, 4
GLOBAL = np.random.default_rng(5)


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(COUNT, 4, generator=generator), torch.arange(COUNT) % 2)


class Permuting(Sampler):
    """An order drawn by whatever ``draw`` gives; made at the first pass where ``late``."""

    def __init__(self, make: Any, late: bool = False):
        self.make, self.source = make, None if late else make()

    def __iter__(self):
        if self.source is None:
            self.source = self.make()
        order = list(range(COUNT))
        self.source.shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return COUNT


class Counting(Sampler):
    """A new order at each pass, from a number of its own."""

    def __init__(self, seed: int):
        self.seed, self.passes = seed, 0

    def __iter__(self):
        self.passes += 1
        return iter(np.random.default_rng(self.seed + self.passes).permutation(COUNT).tolist())

    def __len__(self) -> int:
        return COUNT


class Noisy(Dataset):
    """Adds noise by a function of one argument."""

    def __init__(self, inner: Dataset, noise: Any):
        self.inner, self.noise = inner, noise

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.inner[index]
        return x + self.noise(4), y

    def __len__(self) -> int:
        return len(self.inner)


class Slotted:
    __slots__ = ("numbers",)

    def __init__(self) -> None:
        self.numbers = np.random.default_rng(2)

    def __call__(self, count: int) -> Tensor:
        return torch.from_numpy(self.numbers.standard_normal(count)).float()


class OfClass:
    numbers: Any = None  # a test sets it

    def __call__(self, count: int) -> Tensor:
        return torch.from_numpy(type(self).numbers.standard_normal(count)).float()


def from_global(count: int) -> Tensor:
    return torch.from_numpy(GLOBAL.standard_normal(count)).float()


def enclosed() -> Any:
    generator = torch.Generator().manual_seed(4)
    return lambda count: torch.randn(count, generator=generator)


def by_keyword(count: int, *, numbers: random.Random) -> Tensor:
    return torch.tensor([numbers.gauss(0.0, 1.0) for _ in range(count)])


def sobol() -> DataLoader:
    engine = torch.quasirandom.SobolEngine(4, scramble=True)
    return loader(Noisy(dataset(), lambda count: engine.draw()[0]))


class Raw:
    """Draws from a bit generator that no Generator holds for long."""

    def __init__(self, bits: np.random.BitGenerator):
        self.bits = bits

    def __call__(self, count: int) -> Tensor:
        return torch.from_numpy(np.random.Generator(self.bits).standard_normal(count)).float()


class Epochs(Dataset):
    """Draws by its epoch, as data sets with ``set_epoch`` do."""

    def __init__(self, inner: Dataset):
        self.inner, self.epoch = inner, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.inner[index]
        return x + 0.1 * self.epoch * (index % 3), y

    def __len__(self) -> int:
        return len(self.inner)


class Streamed(IterableDataset):
    """A new order at each pass, which it counts."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        data = dataset()
        for index in np.random.default_rng(self.passes).permutation(COUNT).tolist():
            yield data[index]


class Chained(IterableDataset):
    def __init__(self, inner: IterableDataset):
        self.inner = inner

    def __iter__(self):
        return iter(self.inner)


class OwnLoader:
    """Batches in an order of its own at each pass, which it counts; one that is indexed as well counts as much."""

    def __init__(self, inner: Any):
        self.inner, self.passes = inner, 0

    def __len__(self) -> int:
        return COUNT // SIZE

    def __iter__(self):
        self.passes += 1
        batches = list(self.inner)
        return iter([batches[(i + self.passes) % len(batches)] for i in range(len(batches))])


class Indexed(OwnLoader):
    def __getitem__(self, index: int):
        return list(self.inner)[index]


class HiddenEpochs(Epochs):
    """Does not show its epoch."""

    def __init__(self, inner: Dataset):
        self.inner, self._state = inner, {"e": 0}

    def set_epoch(self, epoch: int) -> None:
        self._state = {"e": epoch}

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.inner[index]
        return x + 0.1 * self._state["e"] * (index % 3), y


def loader(data: Dataset | None = None, **arguments: Any) -> DataLoader:
    return DataLoader(dataset() if data is None else data, batch_size=SIZE, **arguments)


def nested() -> DataLoader:
    noisy = Noisy(dataset(), Slotted())
    return loader(Subset(ConcatDataset([noisy, noisy]), list(range(COUNT))))


def collating() -> DataLoader:
    numbers = np.random.default_rng(8)

    def collate(items: list) -> tuple[Tensor, Tensor]:
        x, y = torch.utils.data.default_collate(items)
        return x + float(numbers.standard_normal()), y

    return loader(collate_fn=collate)


def batched(sampler: Sampler) -> DataLoader:
    return DataLoader(dataset(), batch_sampler=BatchSampler(sampler, SIZE, drop_last=False))


def of_class() -> DataLoader:
    OfClass.numbers = np.random.default_rng(3)
    return loader(Noisy(dataset(), OfClass()))


def of_module() -> DataLoader:
    GLOBAL.bit_generator.state = np.random.default_rng(5).bit_generator.state
    return loader(Noisy(dataset(), from_global))


LOADERS = {
    "torch generator of a batch sampler's sampler": lambda: batched(
        RandomSampler(range(COUNT), generator=torch.Generator().manual_seed(9))
    ),
    "numpy generator": lambda: loader(sampler=Permuting(lambda: np.random.default_rng(0))),
    "numpy generator, late": lambda: loader(sampler=Permuting(lambda: np.random.default_rng(0), late=True)),
    "numpy Philox": lambda: loader(sampler=Permuting(lambda: np.random.Generator(np.random.Philox(3)))),
    "numpy MT19937": lambda: loader(sampler=Permuting(lambda: np.random.Generator(np.random.MT19937(3)), late=True)),
    "numpy RandomState": lambda: loader(sampler=Permuting(lambda: np.random.RandomState(3), late=True)),
    "random.Random": lambda: batched(Permuting(lambda: random.Random(3), late=True)),
    "a counter": lambda: loader(sampler=Counting(1)),
    "a counter of a streamed data set": lambda: loader(Streamed()),
    "a counter of a streamed data set in another": lambda: loader(Chained(Streamed())),
    "a counter of a loader": lambda: OwnLoader(loader()),
    "a counter of a loader that is indexed": lambda: Indexed(loader()),
    "a counter of a loader in a loader": lambda: OwnLoader(OwnLoader(loader())),
    "numpy PCG64 alone": lambda: loader(Noisy(dataset(), Raw(np.random.PCG64(3)))),
    "numpy MT19937 alone": lambda: loader(Noisy(dataset(), Raw(np.random.MT19937(3)))),
    "a Sobol engine": sobol,
    "nested data sets": nested,
    "a collate function": collating,
    "a closure": lambda: loader(Noisy(dataset(), enclosed())),
    "a partial": lambda: loader(Noisy(dataset(), partial(by_keyword, numbers=random.Random(1)))),
    "a class": of_class,
    "a module": of_module,
    "a transform that is a module": lambda: loader(Noisy(dataset(), Transform())),
    "DistributedSampler": lambda: loader(sampler=DistributedSampler(dataset(), 1, 0)),
    "DistributedSampler in a batch sampler": lambda: batched(DistributedSampler(dataset(), 1, 0)),
    "a data set's epochs": lambda: loader(Epochs(dataset()), shuffle=True),
    "hidden epochs": lambda: loader(HiddenEpochs(dataset())),
}


class Transform(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Identity())
        self.generator = torch.Generator().manual_seed(12)

    def forward(self, count: int) -> Tensor:
        return torch.randn(count, generator=self.generator)


def trained(retain: Any, model: nn.Module | None = None, iterations: int = 15, **arguments: Any):
    """Weights of a short run on it, and its result."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2) if model is None else model
    method = parse(f"finetune:iterations={iterations},lr=0.1")
    result = Unlearner(model, Classification(), method, split_batches=False).run(None, retain, **arguments)
    return {name: value.clone() for name, value in model.state_dict().items()}, result
