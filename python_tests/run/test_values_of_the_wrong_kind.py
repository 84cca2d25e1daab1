"""Tensors without values, models without modes, data that are none, words in lists: each a sentence, nothing raw."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from helpers.runs import identical, weights
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from unlearn_ext import FisherDiagonal, InputError, SaliencyMask, Unlearner
from unlearn_ext.evaluation import accuracy, kl_divergence, predict
from unlearn_ext.methods import SSD, SFRon, parse
from unlearn_ext.tasks import Classification

LOGITS, LABELS = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.arange(3)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a prototype, torch says
    NESTED = [torch.nested.nested_tensor([torch.zeros(2, 3)], layout=how) for how in (torch.strided, torch.jagged)]
META = r"a torch.\w+ tensor of shape .* on the meta device"


def batches(count: int, seed: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, 4, generator=generator), torch.arange(6) % 3) for _ in range(count)]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def normed() -> nn.Module:
    model = net()
    parametrizations.weight_norm(model[0])
    return model


def run(model: nn.Module, retain: object = None) -> None:
    method = parse("finetune:iterations=2,lr=0.1")
    Unlearner(model, Classification(), method).run(None, batches(2, 1) if retain is None else retain)


def measure(model: nn.Module, data: object = None) -> None:
    FisherDiagonal(model, Classification()).measure(batches(2, 1) if data is None else data, name="forget")


def dampen(model: nn.Module, forget: object = None, retain: object = None) -> None:
    sets = batches(2, 1) if forget is None else forget, batches(4, 2) if retain is None else retain
    SSD(alpha=1.1).run(model, Classification(), *sets)


def look(model: nn.Module) -> None:
    predict(model, batches(2, 1))


EVERY = pytest.mark.parametrize("use", [run, measure, dampen, look], ids=lambda use: use.__name__)
TRAINING = pytest.mark.parametrize("use", [run, measure, dampen], ids=lambda use: use.__name__)


class Varying(nn.Module):
    def forward(self, x):
        return torch.zeros(len(x), 2 + int(bool(x.sum() > 0)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: accuracy(LOGITS.to("meta"), LABELS), f"logits: .*{META}"),
        (lambda: accuracy(LOGITS, LABELS.to("meta")), f"labels: .*{META}"),
        (lambda: kl_divergence(LOGITS, LOGITS.to("meta")), f"unlearned_logits: .*{META}"),
        *((lambda n=n: accuracy(n, LABELS), "logits: .* got a nested torch.float32 tensor") for n in NESTED),
        *((lambda n=n: accuracy(LOGITS, n), "labels: .* got a nested torch.float32 tensor") for n in NESTED),
        *((lambda n=n: run(net(), [(LOGITS, n)]), "labels: expected a dense tensor, got a nested") for n in NESTED),
        (lambda: SaliencyMask.top_fraction({"a": LOGITS.to("meta")}, 0.5), f"score of a: .*{META}"),
        (lambda: SaliencyMask.top_fraction({"a": NESTED[0]}, 0.5), "score of a: .* a nested torch.float32 tensor"),
        (lambda: SaliencyMask.from_dict({"a": (LOGITS > 0).to("meta")}), f"mask of a: .*{META}"),
        (
            lambda: predict(Varying(), [(x, LABELS) for x in (torch.ones(3, 4), -torch.ones(3, 4))]),
            "model: expected logits of 3 classes, as for the batches before, got .* of shape .3, 2",
        ),
    ],
)
def test_tensors_without_values(call: Callable, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


@EVERY
def test_models_without_values(use) -> None:
    with pytest.raises(InputError, match=r"0\.weight is on the meta device and has no values"):
        use(net().to("meta"))


@TRAINING
def test_models_without_shapes(use) -> None:
    with pytest.raises(InputError, match=r"0\.weight has no shape yet"):
        use(nn.Sequential(nn.LazyLinear(3)))


@TRAINING
def test_weights_that_are_cached(use) -> None:
    """The first value is made without a graph, and steps would never reach what it is made of."""
    model = normed()
    with parametrize.cached(), pytest.raises(InputError, match=r"parametrize\.cached.* outside of it"):
        use(model)
    use(model)
    assert not identical(weights(model), weights(normed())) or use is measure
    with parametrize.cached():
        use(net())  # which has none


@EVERY
def test_exported_models(use) -> None:
    exported = torch.export.export(net(), (torch.zeros(6, 4),)).module()
    for model in (exported, nn.Sequential(exported, nn.Linear(3, 3))):
        with pytest.raises(InputError, match=r"has no eval mode .*: pass the one that it was exported from"):
            use(model)
        assert model.training


@pytest.mark.parametrize("data", [False, 5, net])
def test_data_that_are_none(data) -> None:
    for use, name in ((run, "retain"), (measure, "forget"), (dampen, "forget")):
        with pytest.raises(InputError, match=f"the {name} set is no iterable of batches but .*: pass a DataLoader"):
            use(net(), data)
    with pytest.raises(InputError, match="the retain set is no iterable of batches but"):
        dampen(net(), None, data)


@TRAINING
def test_a_length_that_is_not_implemented(use) -> None:
    class Unsized(list):
        def __len__(self):
            raise NotImplementedError

    models = net(), net()
    for model, data in zip(models, (batches(2, 1), Unsized(batches(2, 1))), strict=True):
        use(model, data)
    assert identical(*map(weights, models))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Unlearner(net(), Classification(), "finetune", mixed_precision=["no"]), "mixed_precision: expected"),
        (lambda: SFRon(rule=["adam"]), "rule: expected"),
        (lambda: SFRon(forget_rule=["adam"], dual_state=True), "forget_rule: expected"),
        (lambda: SFRon(lr_schedule=["cosine"]), "lr_schedule: expected"),
        (lambda: SFRon(forget_schedule=["linear"]), "forget_schedule: expected"),
        (lambda: SFRon.preset(["ddpm-cifar10"]), "no preset"),
    ],
)
def test_words_in_a_list(call, words) -> None:
    with pytest.raises(InputError, match=words):
        call()
