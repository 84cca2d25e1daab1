"""Random numbers, epochs and counters of the data's own: resumed, and not disturbed."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from helpers.runs import identical
from helpers.streams import COUNT, LOADERS, SIZE, Noisy, Permuting, Slotted, dataset, loader, trained
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from unlearn_ext import InputError
from unlearn_ext.data import rng
from unlearn_ext.data.sources import Sources
from unlearn_ext.errors import DamagedError

PASS = COUNT // SIZE
# Like one of the others, but for its kind of generator or where it is found.
ALIKE = {"numpy Philox", "numpy MT19937", "numpy RandomState", "numpy PCG64 alone", "numpy MT19937 alone"}
ALIKE |= {"a partial", "a class", "a module", "a counter of a streamed data set in another"}
ALIKE |= {"a counter of a loader in a loader", "DistributedSampler in a batch sampler"}
all_loaders = pytest.mark.parametrize(
    "make",
    [pytest.param(make, id=name, marks=pytest.mark.slow if name in ALIKE else ()) for name, make in LOADERS.items()],
)


@all_loaders
def test_a_resumed_run_is_the_same(make, tmp_path) -> None:
    """From the middle of a pass, and from its very end; with loaders that are new, and one that was used."""
    whole, _ = trained(make(), output_dir=tmp_path, checkpointing_steps=3)
    for at, used in ((9, False), (12, False), (9, True)):
        retain = make()
        if used:
            for _ in range(3):
                list(retain)
        again, _ = trained(retain, output_dir=tmp_path, resume_from_checkpoint=tmp_path / f"checkpoint-{at}")
        assert identical(whole, again), (at, used)


@all_loaders
def test_an_evaluation_of_the_same_loader_changes_nothing(make) -> None:
    expected, _ = trained(make())
    retain = make()
    found, _ = trained(retain, evaluate=lambda model, step: {"n": len(list(retain))}, evaluate_every=2)
    assert identical(expected, found)


@pytest.mark.parametrize("name", ["DistributedSampler", "DistributedSampler in a batch sampler", "hidden epochs"])
def test_every_pass_has_its_epoch(name) -> None:
    orders: list[list[float]] = []
    retain = LOADERS[name]()

    class Watched:
        def __len__(self):
            return len(retain)

        def __getattr__(self, name):
            return getattr(retain, name)

        sampler = property(lambda self: retain.sampler)

        def __iter__(self):
            orders.append([])
            for batch in retain:
                orders[-1] += batch[0][:, 0].tolist()
                yield batch

    watched = Watched()
    watched.loader = retain
    trained(watched, iterations=3 * PASS)
    assert len(orders) == 4 and orders[0] == orders[1], "the first pass is the look at the data"
    assert len({tuple(order) for order in orders}) == 3


def test_the_first_epoch_is_the_users() -> None:
    sampler = DistributedSampler(dataset(), 1, 0)
    sampler.set_epoch(7)
    trained(loader(sampler=sampler), iterations=2 * PASS + 1)
    assert sampler.epoch == 9


class Streaming(IterableDataset):
    def __init__(self):
        self.numbers = np.random.default_rng(1)

    def __iter__(self):
        data = dataset()
        for index in self.numbers.permutation(COUNT).tolist():
            yield data[index]


def test_streamed_data(tmp_path) -> None:
    make = lambda: DataLoader(Streaming(), batch_size=SIZE)  # noqa: E731
    whole, _ = trained(make(), output_dir=tmp_path, checkpointing_steps=4)
    again, _ = trained(make(), output_dir=tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-8")
    assert identical(whole, again)


class Ongoing(IterableDataset):
    """Goes on, at each pass, where the last one stopped."""

    def __init__(self):
        self._place = [0]

    def __iter__(self):
        for _ in range(10):
            self._place[0] += 1
            yield dataset()[self._place[0] % COUNT]

    def state_dict(self):
        return {"place": self._place[0]}

    def load_state_dict(self, state):
        self._place = [state["place"]]


@pytest.mark.parametrize("used", [False, True])
def test_a_data_set_with_a_state_of_its_own(used, tmp_path) -> None:
    make = lambda: DataLoader(Ongoing(), batch_size=2)  # noqa: E731
    whole, _ = trained(make(), output_dir=tmp_path, checkpointing_steps=4)
    retain = make()
    if used:
        list(retain)
    again, _ = trained(retain, output_dir=tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-8")
    assert identical(whole, again)


class Shaking(nn.Module):
    """Noise from a generator of the model's own."""

    def __init__(self):
        super().__init__()
        self.head, self.generator = nn.Linear(4, 2), torch.Generator().manual_seed(2)

    def forward(self, x):
        return self.head(x + torch.randn(x.shape, generator=self.generator))


def test_a_generator_of_the_model(tmp_path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(1)
        return Shaking()

    whole, _ = trained(loader(), model(), output_dir=tmp_path, checkpointing_steps=5)
    again, _ = trained(loader(), model(), output_dir=tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-10")
    assert identical(whole, again)


def numpy_sampler() -> DataLoader:
    return LOADERS["numpy generator"]()


@pytest.mark.parametrize(
    "other, message",
    [
        (
            lambda: loader(),
            r"had 1 generators .* has 0 now: pass the same loaders \(retain\.sampler\.source is missing",
        ),
        (
            lambda: loader(Noisy(dataset(), Slotted()), sampler=numpy_sampler().sampler),
            r"has 2 now.*noise\.numbers is new",
        ),
        (lambda: LOADERS["random.Random"](), "pass the same loaders"),
        (
            lambda: loader(sampler=Permuting(lambda: random.Random(3))),
            r"retain\.sampler\.source was a generator of kind numpy\.Generator\.PCG64 .* is one of random now",
        ),
    ],
)
def test_other_generators_are_refused_before_anything_is_changed(other, message, tmp_path) -> None:
    trained(numpy_sampler(), output_dir=tmp_path, checkpointing_steps=5)
    model = nn.Linear(4, 2)
    before = model.weight.detach().clone()
    with pytest.raises(InputError, match=message):
        trained(other(), model, output_dir=tmp_path, resume_from_checkpoint="latest")
    assert torch.equal(before, model.weight)


@pytest.mark.parametrize("kind", ["torch.cuda:31", "torch.mps", "torch.xpu:3"])
def test_a_generator_of_a_device_that_is_not_here_is_no_damage(kind) -> None:
    """A checkpoint may be resumed on a machine with fewer devices: the sentence says which generators differ."""
    roots = {"retain": torch.Generator()}
    state = rng.capture(roots)
    state["generators"][0]["kind"] = kind
    with pytest.raises(InputError, match=f"retain was a generator of kind {kind} .* is one of torch.cpu now") as caught:
        rng.check(state, roots)
    assert not isinstance(caught.value, DamagedError)
    del state["states"]
    with pytest.raises(DamagedError):
        rng.check(state, roots)


def test_a_generator_by_two_ways_is_one() -> None:
    numbers = np.random.default_rng(0)
    sources = Sources({"a": {"x": numbers, "y": [numbers]}, "b": numbers})
    ((paths, found),) = sources.generators
    assert found is numbers and sorted(paths) == ["a[x]", "a[y][0]", "b"]


def test_looking_calls_nothing_of_the_objects() -> None:
    class Touchy:
        def __init__(self):
            self.plain = np.random.default_rng(0)

        @property
        def costly(self):
            raise AssertionError("a property was called")

        def __getattr__(self, name):
            raise AssertionError(f"{name} was asked for")

    assert len(Sources({"data": Touchy()}).generators) == 1


def test_containers_are_read_by_their_own_methods() -> None:
    class Reading(list):
        def __iter__(self):
            raise AssertionError("a pass was begun")

    assert len(Sources({"data": Reading([np.random.default_rng(0)])}).generators) == 1


def test_a_root_that_is_large_hides_no_other() -> None:
    big = [[[object()] for _ in range(1000)] for _ in range(50)]
    assert len(Sources({"data": big, "model": Shaking()}).generators) == 1


def test_large_data_are_not_walked_through() -> None:
    big = [(f"{i}.png", {"label": i}) for i in range(100_000)]
    assert len(Sources({"data": loader(big)}).objects) < 3000


def test_what_is_saved_is_json(tmp_path) -> None:
    trained(LOADERS["numpy Philox"](), output_dir=tmp_path, checkpointing_steps=15)
    document = json.loads((tmp_path / "checkpoint-15" / "state.json").read_text())
    (generator,) = document["rng"][0]["generators"]
    assert generator["kind"] == "numpy.Generator.Philox" and list(generator["paths"]) == ["retain.sampler.source"]


def test_caches_of_indexed_data_keep_their_numbers() -> None:
    """Put back, the number would tell of a part that is not in the cache any more."""

    class InParts(Dataset):
        part, rows = -1, None

        def __len__(self):
            return COUNT

        def __getitem__(self, index):
            if index // SIZE != self.part:
                self.part, self.rows = index // SIZE, [dataset()[index // SIZE * SIZE + i] for i in range(SIZE)]
            return self.rows[index % SIZE]

    expected, _ = trained(DataLoader(InParts(), batch_size=3))
    retain = DataLoader(InParts(), batch_size=3)
    found, _ = trained(retain, evaluate=lambda model, step: {"n": len(list(retain))}, evaluate_every=2)
    assert identical(expected, found)
