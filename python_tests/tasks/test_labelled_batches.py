"""Batches as loaders give them: pairs, dicts of keyword arguments with labels, what transformers' collators make."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from helpers.models import ConvNet, batches, make
from helpers.runs import identical, method, run, weights
from helpers.transformer_nets import bert, loader, pad, texts
from torch import nn
from torch.nn import functional as F

from unlearn_ext import FisherDiagonal, InputError, Unlearner, evaluation
from unlearn_ext.distributed.batches import own_part
from unlearn_ext.distributed.hashing import sample_hashes, sample_numbers
from unlearn_ext.distributed.ranks import ALONE, Ranks
from unlearn_ext.tasks import Classification

CPU = torch.device("cpu")


def data(form=lambda x, y: (x, y)) -> dict[str, list]:
    sets = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    return {name: [form(*batch) for batch in found] for name, found in sets.items()}


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: {"x": x, "labels": y},
        lambda x, y: UserDict(label=y, x=x),
        lambda x, y: {"image": x, "label": y},  # a name that the forward has not
        lambda x, y: {"pixel_values": x, "labels": y},
        lambda x, y: ({"x": x}, y),
        lambda x, y: [UserDict(x=x), y],
    ],
)
def test_every_form_trains_as_pairs_do(form) -> None:
    pairs, other = make(), make()
    expected = run(pairs, data())
    result = run(other, data(form))
    assert identical(weights(pairs), weights(other)) and not identical(weights(pairs), weights(make()))
    assert [entry["forget_loss"] for entry in result.history] == [entry["forget_loss"] for entry in expected.history]
    logits = evaluation.predict(other, [form(*batch) for batch in data()["retain"]])[0]
    assert torch.equal(logits, evaluation.predict(other, data()["retain"])[0])


def test_labels_under_another_name() -> None:
    pairs, other = make(), make()
    run(pairs, data())
    named = data(lambda x, y: {"x": x, "target": y})
    with pytest.raises(InputError, match=r"got a dict of x, target, without labels or label"):
        run(make(), named)
    Unlearner(other, Classification(label_key="target"), method()).run(**named)
    assert identical(weights(pairs), weights(other))
    logits, labels = evaluation.predict(other, named["forget"], label_key="target")
    assert logits.shape == (18, 4) and torch.equal(labels, torch.cat([y for _, y in data()["forget"]]))
    both = data(lambda x, y: {"x": x, "label": y, "labels": y})
    with pytest.raises(InputError, match="labels and label: say with label_key"):
        run(make(), both)


class Wrapping(ConvNet):
    wrap = staticmethod(lambda logits: logits)

    def forward(self, x):
        return self.wrap(super().forward(x))


@pytest.mark.parametrize("wrap", [lambda z: {"logits": z}, lambda z: SimpleNamespace(logits=z, hidden=None)])
def test_outputs_that_hold_logits(wrap) -> None:
    plain, wrapped = make(), make(Wrapping)
    wrapped.wrap = wrap
    run(plain, data())
    run(wrapped, data())
    assert identical(weights(plain), weights(wrapped))


def test_arguments_that_the_model_does_not_take() -> None:
    for form, words in (
        (
            lambda x, y: {"x": x, "idx": y, "labels": y},
            r"has idx, which the forward of ConvNet does not take.*takes x$",
        ),
        (lambda x, y: {"x": x, "sentence": ["a"] * len(y), "labels": y}, r"sentence \(a list of 6 str\).*tokenize"),
        (lambda x, y: {"x": x, "mask": None, "labels": y}, r"mask \(None\)"),
        (lambda x, y: {"labels": y}, r"got a dict of labels"),
    ):
        model = make()
        with pytest.raises(InputError, match=words):
            run(model, data(form), {"gamma": None})
        assert identical(weights(model), weights(make()))


def test_arguments_that_are_missing_or_hidden() -> None:
    class Masked(ConvNet):
        def forward(self, x, mask, **others):
            return super().forward(x * mask, **others)

    with pytest.raises(InputError, match=r"Masked cannot be called with x \(.*missing 1 required.*mask"):
        run(make(Masked), data(lambda x, y: {"x": x, "labels": y}))
    with pytest.raises(InputError, match=r"Masked cannot be called with the inputs alone \(.*mask.*as dicts"):
        run(make(Masked), data())
    hidden = data(lambda x, y: {"x": x, "mask": torch.ones_like(x), "idx": y, "labels": y})
    with pytest.raises(InputError, match=r"Masked cannot be called with x, mask, idx \(.*unexpected keyword.*idx"):
        run(make(Masked), hidden)


# --- Texts --------------------------------------------------------------------------------------------------


def test_losses_are_those_that_transformers_computes() -> None:
    model, batch = bert(), pad(texts(5, seed=1))
    task = Classification()
    task.begin(model, batch)
    losses = task.losses(model, task.prepare(batch, CPU))
    assert losses.shape == (5,) and torch.allclose(losses.mean(), model(**batch).loss, atol=1e-6)
    assert task.size(batch) == 5 and set(task.inputs(batch)) == {"input_ids", "token_type_ids", "attention_mask"}


def test_predictions_are_those_of_the_model() -> None:
    model = bert()
    logits, labels = evaluation.predict(model, loader("bert", 10, seed=1))
    with torch.no_grad():
        expected = torch.cat([model(**batch).logits for batch in loader("bert", 10, seed=1)])
    assert torch.equal(logits, expected) and labels.tolist() == [i % 3 for i in range(10)]


def test_fisher_sums_are_squared_gradients() -> None:
    model = bert()
    fisher = FisherDiagonal(model, Classification()).measure(loader("bert", 6, seed=1))
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in loader("bert", 6, seed=1):
        gradients = torch.autograd.grad(model(**batch).loss, list(model.parameters()))
        for name, gradient in zip(expected, gradients, strict=True):
            expected[name] += gradient**2
    assert all(torch.allclose(fisher.sums[name], total, rtol=1e-4, atol=1e-9) for name, total in expected.items())
    exact = FisherDiagonal(model, Classification(), per_sample=True, chunk=1).measure(loader("bert", 6, seed=1))
    assert exact.count == 6
    with pytest.raises(InputError, match=r"torch.func cannot run this model.*set chunk=1"):
        FisherDiagonal(model, Classification(), per_sample=True).measure(loader("bert", 6, seed=1))


def test_a_text_is_the_same_sample_however_it_is_padded() -> None:
    samples = texts(6, seed=3)
    task, model = Classification(), bert()
    task.begin(model, pad(samples))
    short = task.inputs(pad(samples))
    others = [task.inputs(pad(samples, length=14)), task.inputs(pad(samples, length=12, left=True))]
    for other in others:
        assert sample_hashes(other) == sample_hashes(short)
        assert torch.equal(sample_numbers(other, 0), sample_numbers(short, 0))
    assert len(set(sample_hashes(short))) == 6 and len(set(sample_numbers(short, 0).tolist())) == 6
    assert not torch.equal(sample_numbers(short, 1), sample_numbers(short, 0))
    types = {**short, "token_type_ids": 1 - short["token_type_ids"]}
    assert not set(sample_hashes(types)) & set(sample_hashes(short))
    assert not set(sample_numbers(types, 0).tolist()) & set(sample_numbers(short, 0).tolist())
    unmasked = {name: tensor for name, tensor in others[0].items() if name != "attention_mask"}
    assert not set(sample_hashes(unmasked)) & set(sample_hashes(short))


def test_padding_says_nothing_of_images() -> None:
    """Three channels beside three tokens."""
    generator = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.ones(4, 3, dtype=torch.int64), "attention_mask": torch.tensor([[1, 0, 0]] * 4)}
    inputs["pixel_values"] = torch.zeros(4, 3, 2, 2)
    inputs["pixel_values"][:, 2] = torch.randn(4, 2, 2, generator=generator)
    assert len(set(sample_hashes(inputs))) == 4 and len(set(sample_numbers(inputs, 0).tolist())) == 4


def test_texts_in_both_sets_are_refused() -> None:
    forget, retain = texts(8, seed=1), texts(12, seed=2)
    longest = {"input_ids": torch.ones(15, dtype=torch.int64), "token_type_ids": torch.zeros(15, dtype=torch.int64)}
    retain[9:11] = [forget[5], {**longest, "label": 0}]  # padded to the length of its neighbour
    cut = {"forget": [pad(forget[:4]), pad(forget[4:])], "retain": [pad(retain[:8]), pad(retain[8:])]}
    with pytest.raises(InputError, match="sample 9 of the retain set is also in the forget set"):
        run(bert(), cut, {"gamma": None})


def test_wrong_labels_stay_with_a_text_in_every_batch_and_part() -> None:
    task, model, samples = Classification(), bert(), texts(7, seed=4)
    found: list[torch.Tensor] = []

    def loss(logits, labels):
        found.append(labels)
        return F.cross_entropy(logits, labels, reduction="none")

    task.loss = loss
    task.begin(model, pad(samples))

    def drawn(batch, ranks=ALONE) -> torch.Tensor:
        prepared, _ = own_part(task.prepare(batch, CPU), task.size(batch), ranks)
        task.replacement_losses(model, prepared)
        return found[-1]

    wrong, labels = drawn(pad(samples)), torch.tensor([sample["label"] for sample in samples])
    assert not (wrong == labels).any()
    assert torch.equal(drawn(pad(samples, length=14)), wrong)
    assert torch.equal(torch.cat([drawn(pad(samples[:3])), drawn(pad(samples[3:]))]), wrong)
    parts = [drawn(pad(samples), Ranks(rank=rank, size=3)) for rank in range(3)]
    assert torch.equal(torch.cat(parts), wrong)
    given = UserDict(pad(samples), replace_labels=(labels + 1) % 3)
    assert torch.equal(drawn(given), (labels + 1) % 3)


def test_a_ranks_part_has_the_losses_of_its_samples() -> None:
    task, model, batch = Classification(), bert(), pad(texts(5, seed=1))
    prepared = task.prepare(batch, CPU)
    whole = task.losses(model, prepared)
    for rank in range(2):
        part, count = own_part(prepared, 5, Ranks(rank=rank, size=2))
        assert torch.allclose(task.losses(model, part), whole[:3] if rank == 0 else whole[3:], atol=1e-6)
        assert count == (3 if rank == 0 else 2)


def test_the_loss_of_ones_own_gets_what_the_batch_calls_labels() -> None:
    soft = data(lambda x, y: {"x": x, "labels": F.one_hot(y, 4).float()})
    loss = nn.CrossEntropyLoss(reduction="none")
    assert Unlearner(make(), Classification(loss), method()).run(**soft).counts["iterations"] == 12
    with pytest.raises(InputError, match=r"loss: expected a function.*got the class CrossEntropyLoss"):
        Classification(nn.CrossEntropyLoss)
