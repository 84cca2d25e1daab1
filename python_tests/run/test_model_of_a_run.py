"""A run trains what the model is when it is called."""

from __future__ import annotations

import pytest
import torch
from helpers.models import batches, make
from helpers.runs import identical, method, run, weights
from torch import nn
from torch.nn.utils import prune

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


def new_frozen_layer(model: nn.Module) -> None:
    model.conv = nn.Conv2d(2, 6, 3, padding=1).requires_grad_(False)


def undone(model: nn.Module) -> None:
    model.double().requires_grad_(False).eval()
    model.float()
    model.norm.requires_grad_(True)
    model.head.requires_grad_(True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (replaced, r"head\.weight was replaced, added or removed"),
        (assigned, r"conv\.weight was replaced"),
        (new_frozen_layer, r"conv\.weight was replaced"),
        (lambda model: model.register_parameter("more", nn.Parameter(torch.ones(2))), "more was replaced, added"),
        (thawed, r"conv\.weight has requires_grad=True where it had False"),
        (lambda model: model.requires_grad_(False), r"norm\.weight has requires_grad=False where it had True"),
        (lambda model: model.double(), r"conv\.weight has dtype=torch\.float64 where it had torch\.float32"),
        (lambda model: model.head.bfloat16(), r"head\.weight has dtype=torch\.bfloat16"),
        (lambda model: model.to(memory_format=torch.channels_last), r"conv\.weight has strides="),
        (undone, None),
    ],
)
def test_an_evaluation_leaves_the_weights_what_they_are(change, says) -> None:
    model = make()
    model.conv.requires_grad_(False)

    def evaluated() -> None:
        run(model, DATA, SHORT, evaluate=lambda model, step: change(model) and None, evaluate_every=1)

    if says is None:
        evaluated()
        return
    with pytest.raises(InputError, match=f"^{says}.* while the run was under way: change the model before run"):
        evaluated()


@pytest.mark.parametrize("of_a_graph", [True, False])
def test_weights_that_are_no_parameters_are_refused(of_a_graph: bool) -> None:
    model = make()
    weight = model.head.weight
    del model.head.weight
    model.head.weight = weight * 1 if of_a_graph else weight.detach().requires_grad_()
    with pytest.raises(InputError, match=r"^head\.weight is a plain tensor that requires grad, and no parameter"):
        unlearner(model)


def test_weights_that_hooks_make_are_not() -> None:
    model = make()
    prune.l1_unstructured(model.head, "weight", 0.5)
    nn.utils.weight_norm(model.conv)
    run(model, DATA, SHORT)
