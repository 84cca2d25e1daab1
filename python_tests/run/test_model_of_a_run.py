"""A run trains what the model is when it is called."""

from __future__ import annotations

import pytest
import torch
from helpers.models import batches, make
from helpers.runs import identical, method, run, weights
from torch import nn

from unlearn_ext import InputError, Unlearner
from unlearn_ext.tasks import Classification

DATA = {"forget": batches(2, 6, seed=1), "retain": batches(2, 6, seed=2)}
SHORT = {"iterations": 3, "momentum": 0.9}


def unlearner(model: nn.Module, **changes) -> Unlearner:
    return Unlearner(model, Classification(), method(**{**SHORT, **changes}))


def new_head(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.head = nn.Linear(6, 4)


def assigned(model: nn.Module) -> None:
    model.load_state_dict({name: value.clone() for name, value in make(seed=6).state_dict().items()}, assign=True)


def weight_norm(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.head)


def frozen(model: nn.Module) -> None:
    model.conv.requires_grad_(False)


def adapter(model: nn.Module) -> None:
    """As LoRA: the old layer frozen inside a new one."""
    torch.manual_seed(8)
    inner = model.head.requires_grad_(False)
    model.head = nn.Sequential(inner, nn.Linear(4, 4))


@pytest.mark.parametrize("change", [new_head, assigned, weight_norm, frozen, adapter])
def test_what_changes_after_the_unlearner_was_made_counts(change) -> None:
    before, after = make(), make()
    change(before)
    expected = unlearner(before).run(**DATA)
    late = unlearner(after)
    change(after)
    result = late.run(**DATA)
    assert identical(weights(before), weights(after))
    assert result.counts == expected.counts and result.mask == expected.mask


def test_a_second_run_reads_the_model_again() -> None:
    model = make()
    both = unlearner(model)
    first = both.run(**DATA).counts["trainable_weights"]
    frozen(model)
    conv = weights(model.conv)
    assert both.run(**DATA).counts["trainable_weights"] == first - sum(p.numel() for p in model.conv.parameters())
    assert identical(conv, weights(model.conv))


def test_unfrozen_later() -> None:
    model = make()
    frozen(model)
    late = unlearner(model)
    model.conv.requires_grad_(True)
    before = model.conv.weight.detach().clone()
    late.run(**DATA)
    assert not torch.equal(before, model.conv.weight)


def meta_part(model: nn.Module) -> None:
    model.head.to("meta")


def meta_buffer(model: nn.Module) -> None:
    model.norm.running_mean = model.norm.running_mean.to("meta")


def in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        model.head = nn.Linear(6, 4)


def lazy(model: nn.Module) -> None:
    model.head = nn.LazyLinear(4)


def all_frozen(model: nn.Module) -> None:
    model.requires_grad_(False)


@pytest.mark.parametrize(
    "change, message",
    [
        (meta_part, r"head\.weight is on the meta device and has no values: load the whole model"),
        (meta_buffer, r"norm\.running_mean is on the meta device"),
        (in_inference_mode, r"head\.weight was made in torch\.inference_mode\(\) and cannot be trained"),
        (lazy, r"head\.weight has no shape yet: pass a batch"),
        (all_frozen, "no trainable weights"),
    ],
)
@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_model_that_cannot_be_trained_is_refused_early_and_late(change, message, device) -> None:
    model = make()
    late = Unlearner(model, Classification(), method(**SHORT), device=device)
    change(model)
    with pytest.raises(InputError, match=message):
        late.run(**DATA)
    with pytest.raises(InputError, match=message):
        Unlearner(model, Classification(), method(**SHORT), device=device)


def replaced(model: nn.Module) -> None:
    model.head = nn.Linear(6, 4)


def thawed(model: nn.Module) -> None:
    model.head.requires_grad_(False)
    model.conv.requires_grad_(True)


@pytest.mark.parametrize("change", [replaced, assigned, thawed])
def test_weights_that_an_evaluation_replaces_are_refused(change) -> None:
    model = make()
    model.conv.requires_grad_(change is not thawed)
    with pytest.raises(InputError, match="the model's weights were replaced, or others were unfrozen"):
        run(model, DATA, SHORT, evaluate=lambda model, step: change(model), evaluate_every=1)


def test_an_evaluation_may_freeze_weights() -> None:
    model = make()
    run(model, DATA, SHORT, evaluate=lambda model, step: frozen(model), evaluate_every=2)
