"""Batches that do not fit are refused before the first step, with what was given."""

from __future__ import annotations

import pytest
import torch
from helpers.models import ConvNet, batches, make
from helpers.runs import identical, run, weights
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

from unlearn_ext import FisherDiagonal, InputError, Unlearner, evaluation
from unlearn_ext.methods import SSD, parse
from unlearn_ext.tasks import Classification
from unlearn_ext.tasks.data_check import DataCheck

X, Y = batches(1, 6, seed=3)[0]
# What a loader gives, and what the sentence says after "got", if it says that, or anywhere.
FORMS = {
    "three parts": ([X, Y, Y], r"got 3 parts \(a torch.float32 tensor of shape \[6, 2, 5, 5\], a torch.int64 tensor"),
    "one part": ([X], r"got one part \(a torch.float32"),
    "no part": ([], r"got an empty list"),
    "a tensor": (X, r"got a torch.float32 tensor of shape \[6, 2, 5, 5\]"),
    "None": (None, r"got None"),
    "Nones": ((X, None), r"labels that are None"),
    "text": ("abc", r"got 'abc'"),
    "texts": (([*"abcdef"], Y), r"got inputs that are a list of 6 str and labels.*tokenize"),
    "a list of labels": ((X, Y.tolist()), r"got .*labels that are a list of 6 int: convert labels with torch.tensor"),
    "arrays": ((X.numpy(), Y.numpy()), r"got inputs that are a numpy.ndarray of float32.*numpy.*torch.from_numpy"),
    "two inputs": (((X, X), Y), r"inputs that are a tuple of 2 Tensor"),
    "a sample": ((X[0], Y[0]), r"labels: expected a first dimension of samples.*batch_size"),
    "another number": ((X, Y[:5]), r"6 inputs and 5 labels"),
    "empty": ((X[:0], Y[:0]), r"a batch is empty"),
    "complex": ((X + 0j, Y), r"inputs: expected real numbers, got a torch.complex64 tensor.*view_as_real"),
    "sparse": ((X.to_sparse(), Y), r"expected a dense tensor, got one of torch.sparse_coo"),
    "on no device": ((X.to("meta"), Y), r"inputs: .* on the meta device has no values"),
    "labels on no device": ((X, Y.to("meta")), r"labels: .* on the meta device has no values"),
    "integers": ((X.long(), Y), r"ConvNet, whose weights are torch.float32, does not take inputs of torch.int64"),
    "bytes": ((X.byte(), Y), r"does not take inputs of torch.uint8"),
    "doubles": ((X.double(), Y), r"does not take inputs of torch.float64"),
    "another shape": ((X[:, :1], Y), r"ConvNet does not take inputs of shape \[6, 1, 5, 5\]"),
    "float labels": ((X, Y.float()), r"expected integers of shape \[N\], got torch.float32 of shape \[6\]: .*long"),
    "bool labels": ((X, Y > 1), r"expected integers of shape \[N\], got torch.bool"),
    "one-hot": ((X, nn.functional.one_hot(Y, 4)), r"got torch.int64 of shape \[6, 4\]: use labels.argmax\(1\)"),
    "a column": ((X, Y[:, None]), r"got torch.int64 of shape \[6, 1\]: use labels.squeeze\(1\)"),
    "beyond the classes": ((X, Y + 3), r"label \d is outside the model's 4 classes"),
    "replacements": ({"x": X, "labels": Y, "replace_labels": [0] * 6}, r"replace_labels: expected a tensor"),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("rule", ["sfron", "finetune"])
def test_refused_first_and_last(name, rule) -> None:
    """By a run that measures and by one that only trains, whichever batch it is."""
    bad, words = FORMS[name]
    for retain in ([bad], [*batches(2, 6, seed=2), bad]):
        model = make()
        with pytest.raises(InputError, match=words):
            forget = batches(2, 6, seed=1) if rule == "sfron" else None
            Unlearner(model, Classification(), parse(f"{rule}:iterations=3,lr=0.1")).run(forget, retain)
        assert identical(weights(model), weights(make()))
    if "classes" not in words and "replace" not in words:
        with pytest.raises(InputError, match=words):
            evaluation.predict(make(), [bad])


def test_what_a_loader_drops_is_told() -> None:
    data = TensorDataset(X, Y)
    for loader in (
        DataLoader(data, batch_size=8, drop_last=True),
        DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 8, True)),
    ):
        words = r"its 6 samples do not fill a batch of 8, and drop_last=True: lower batch_size"
        with pytest.raises(InputError, match="the retain set is empty: " + words):
            run(make(), {"forget": batches(2, 6, seed=1), "retain": loader})
        with pytest.raises(InputError, match="the data set is empty: " + words):
            FisherDiagonal(make(), Classification()).measure(loader)
        with pytest.raises(InputError, match="the forget set is empty: " + words):
            SSD().run(make(), Classification(), loader, batches(2, 6, seed=1))
        with pytest.raises(InputError, match="at least one batch, got none: " + words):
            evaluation.predict(make(), loader)
    with pytest.raises(InputError, match="the retain set is empty: pass at least one batch"):
        run(make(), {"forget": batches(2, 6, seed=1), "retain": DataLoader(TensorDataset(X[:0], Y[:0]))})


# --- Data that have one pass --------------------------------------------------------------------------------


class Returning:
    """Gives the iterator that it was made with."""

    def __init__(self, data):
        self.iterator = iter(data)

    def __iter__(self):
        return self.iterator


class Yielding:
    """From a generator that it was made with."""

    def __init__(self, data):
        self.source = (batch for batch in data)

    def __iter__(self):
        yield from self.source


class Streaming(IterableDataset):
    def __init__(self, data):
        self.source = (sample for batch in data for sample in zip(*batch, strict=True))

    def __iter__(self):
        return self.source


class Remembering:
    """Can be iterated again, though it keeps the iterators that it has given."""

    def __init__(self, data):
        self.data, self.last, self.begun = data, None, 0

    def __iter__(self):
        self.begun += 1
        self.last = (batch for batch in self.data)
        yield from self.last


@pytest.mark.parametrize("kind", [Returning, Yielding, lambda data: DataLoader(Streaming(data), batch_size=6)])
@pytest.mark.parametrize("gamma", [0.5, None])
@pytest.mark.parametrize("name", ["forget", "retain"])
def test_data_of_one_pass_are_refused_before_the_first_step(kind, gamma, name) -> None:
    model = make()
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    with pytest.raises(InputError, match=f"the {name} set is empty in its second pass: it can be iterated once only"):
        run(model, {**data, name: kind(data[name])}, {"gamma": gamma})
    assert identical(weights(model), weights(make()))


def test_data_that_keep_an_iterator_may_have_several_passes() -> None:
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    plain, other = make(), make()
    run(plain, data)
    run(other, {name: Remembering(batches) for name, batches in data.items()})
    assert identical(weights(plain), weights(other))


def test_what_measures_once_takes_data_of_one_pass() -> None:
    data = batches(3, 6, seed=1)
    assert FisherDiagonal(make(), Classification()).measure(iter(data)).count == 3
    assert evaluation.predict(make(), (batch for batch in data))[0].shape == (18, 4)


def test_images_without_channels_before_batch_normalisation() -> None:
    model = nn.Sequential(nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(150, 4))
    data = [(X.expand(6, 2, 5, 5)[:, 0], Y)]
    for look in (lambda: run(model, {"forget": data, "retain": data}), lambda: evaluation.predict(model, data)):
        with pytest.raises(InputError, match=r"Sequential does not take inputs of shape \[6, 5, 5\]"):
            look()


# --- Numbers and lengths beyond a model's tables --------------------------------------------------------------


class Reader(nn.Module):
    """A text classifier of 30 tokens and 8 positions."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places, self.head = nn.Embedding(30, 6), nn.Embedding(8, 6), nn.Linear(6, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1])
        return self.head((self.tokens(input_ids) + self.places(places)).mean(1))


class Strict(ConvNet):
    """Checks its inputs as vision transformers do."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] % 5 == 0, f"height ({x.shape[2]}) does not fit the model"
        return super().forward(x)


def tokens(seed: int, length: int = 6, **changes: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 20, (4, length), generator=torch.Generator().manual_seed(seed))
    ids[2, 1] = changes.get("token", 5)
    return {"input_ids": ids, "labels": torch.arange(4)}


BEYOND = {
    "a token": (tokens(9, token=30), r"Reader does not take input_ids of shape \[4, 6\], from \d to 30 \(index out of"),
    "a negative": (tokens(9, token=-1), r"Reader does not take input_ids of shape \[4, 6\], from -1 to \d+ "),
    "a length": (tokens(9, length=9), r"Reader does not take input_ids of shape \[4, 9\], from .*with truncation"),
    "floats": (
        {**tokens(9), "input_ids": torch.ones(4, 6)},
        r"Reader, whose weights are torch.float32, does not take input_ids of torch.float32 \(Expected .*Long",
    ),
}


@pytest.mark.parametrize("name", BEYOND)
@pytest.mark.parametrize(
    ("spec", "where"),
    [
        ("sfron:iterations=3,lr=0.1", "retain"),
        ("negative_gradient_plus:iterations=3,lr=0.1", "forget"),
        ("scrub:epochs=1,msteps=1,lr=0.1", "forget"),
        ("finetune:iterations=3,lr=0.1", "retain"),
    ],
)
def test_beyond_a_table_is_refused_before_the_first_step(name, spec, where) -> None:
    bad, words = BEYOND[name]
    model, sets = make(Reader), {"forget": [tokens(i) for i in range(3)], "retain": [tokens(9 + i) for i in range(4)]}
    sets[where].append(bad)
    with pytest.raises(InputError, match=words):
        Unlearner(model, Classification(), parse(spec)).run(**sets)
    assert identical(weights(model), weights(make(Reader)))


@pytest.mark.parametrize("name", BEYOND)
def test_beyond_a_table_wherever_batches_are_taken(name) -> None:
    bad, words = BEYOND[name]
    with pytest.raises(InputError, match=words):
        evaluation.predict(make(Reader), [tokens(1), bad])
    with pytest.raises(InputError, match=words):
        SSD().run(make(Reader), Classification(), [tokens(1), bad], [tokens(2)])


def test_an_assertion_of_the_model() -> None:
    model, x = make(Strict), X.repeat(1, 1, 2, 1)[:, :, :6]
    with pytest.raises(InputError, match=r"Strict does not take inputs of shape \[6, 2, 6, 5\] \(height \(6\)"):
        run(model, {"forget": batches(2, 6, seed=1), "retain": [*batches(2, 6, seed=2), (x, Y)]})
    assert identical(weights(model), weights(make()))


def fail(x: Tensor) -> Tensor:
    raise AssertionError


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda x: x.mean(4), r"shape \[6, 2, 5, 5\] \(Dimension out of range.*\): give the inputs the shape that"),
        (lambda x: [x][1], None),
        (fail, r"shape \[6, 2, 5, 5\] \(AssertionError\)$"),
    ],
)
def test_a_fault_of_the_model_is_not_told_as_one_of_a_table(fault, words) -> None:
    class Faulty(ConvNet):
        def forward(self, x):
            return fault(x)

    with pytest.raises(IndexError if words is None else InputError, match=words):
        evaluation.predict(Faulty(), [(X, Y)])


def test_only_the_batches_furthest_out_are_tried() -> None:
    class Counted(Reader):
        passes = 0

        def forward(self, input_ids):
            self.passes += 1
            return super().forward(input_ids)

    model, lengths = make(Counted), [2, 3, 4, 3, 5, 6, 7, 5]
    data = [{"input_ids": torch.full((4, n), i), "labels": torch.arange(4)} for i, n in enumerate(lengths)]
    for batch in data:
        batch["input_ids"][0] = 0
        batch["input_ids"][1] = 20
    check = DataCheck(model, Classification(), True)
    check.scan("retain", data)
    assert model.passes == 2  # of the first batch and of 7 tokens
    check.scan("forget", [{**batch, "input_ids": batch["input_ids"] + i} for i, batch in enumerate(data)])
    assert model.passes == 2 + 3  # the first, the longest and the largest
