"""What UnlearnOptimizer refuses, and the configuration of its steps."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import pytest
import torch
from helpers.optimizers import assert_same_bits, gradients, masks_of, named, snapshot
from torch import nn

from unlearn_ext.errors import InputError
from unlearn_ext.optim import StepConfig, UnlearnOptimizer
from unlearn_ext.saliency import SaliencyMask


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rule": "lion"}, "rule: expected one of sgd, momentum, adam, adamw, got 'lion'"),
        ({"forget_rule": "lion", "dual_state": True}, "forget_rule: expected one of"),
        ({"forget_rule": "adam"}, "forget_rule needs a state of its own: set dual_state=True"),
        ({"mask_scope": "retain"}, "mask_scope: expected one of forget, all, got 'retain'"),
        ({"slow_freq": 0}, "slow_freq: expected an integer from 1, got 0"),
        ({"slow_freq": 1.5}, "slow_freq: expected an integer from 1, got 1.5"),
        ({"slow_freq": True}, "slow_freq: expected an integer from 1, got True"),
        ({"slow_rate": 0.0}, r"slow_rate: expected a rate in \(0, 1\], got 0.0"),
        ({"slow_rate": 1.5}, "slow_rate: expected"),
        ({"lr": -1.0}, "lr: expected a finite number from 0, got -1.0"),
        ({"lr": math.nan}, "lr: expected a finite number from 0, got nan"),
        ({"lr": math.inf}, "lr: expected a finite number from 0, got inf"),
        ({"lr": "a"}, "lr: expected a finite number from 0, got 'a'"),
        ({"lr": None}, "lr: expected a finite number from 0, got None"),
        ({"forget_weight": math.nan}, "forget_weight: expected a finite number, got nan"),
        ({"retain_weight": math.inf}, "retain_weight: expected a finite number, got inf"),
        ({"rule": "momentum", "momentum": 1.5}, r"momentum: expected a number in \[0, 1\), got 1.5"),
        ({"forget_lr": -1.0}, "forget_lr: expected a finite number from 0"),
        ({"momentum": -0.1}, r"momentum: expected a number in \[0, 1\)"),
        ({"eps": -1e-8}, "eps: expected a finite number from 0"),
        ({"weight_decay": -0.1}, "weight_decay: expected a finite number from 0"),
        ({"max_norm": 0.0}, "max_norm: expected more than 0, or None for no clipping, got 0.0"),
        ({"retain_max_norm": math.nan}, "retain_max_norm: expected more than 0"),
        ({"betas": (0.9, 1.0)}, r"betas: expected two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, "betas: expected two numbers"),
        ({"betas": 0.9}, "betas: expected two numbers"),
        ({"betas": (0.9, "b")}, "betas: expected two numbers"),
        ({"max_norm": "a"}, "max_norm: expected more than 0, or None for no clipping, got 'a'"),
        ({"protect": True}, "protect=True needs a mask"),
        ({"protect": 1}, "protect: expected True or False, got 1"),
        ({"project": "no"}, "project: expected True or False, got 'no'"),
        ({"stochastic_rounding": None}, "stochastic_rounding: expected True or False, got None"),
        ({"mask": "mask.safetensors"}, "mask: expected a SaliencyMask, such as SaliencyMask.load"),
        ({"momentum": 0.9}, "momentum=0.9 does nothing under rule='sgd': set rule='momentum'"),
        ({"rule": "adam", "momentum": 0.9, "dual_state": True, "forget_rule": "sgd"}, "momentum=0.9 does nothing"),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}") as caught:
        UnlearnOptimizer(named(), **{"rule": "sgd", "lr": 0.1, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "group, message",
    [
        ({"max_norm": 1e-3}, "max_norm is no setting of a parameter group: a group takes lr, momentum, "),
        ({"rule": "adam"}, "rule is no setting of a parameter group"),
        ({"learning_rate": 0.1}, "learning_rate is no setting of a parameter group"),
        ({"lr": -1.0}, "lr: expected a finite number from 0, got -1.0"),
        ({"lr": "a"}, "lr: expected a finite number from 0, got 'a'"),
        ({"momentum": 0.9}, "momentum=0.9 does nothing under rule='sgd'"),
        ({"slow_rate": 2.0}, "slow_rate: expected a rate"),
        ({"betas": (0.9,)}, "betas: expected two numbers"),
    ],
    ids=str,
)
def test_bad_parameter_groups(group: dict[str, Any], message: str) -> None:
    parameters = named()
    with pytest.raises(InputError, match=f"^{message}"):
        UnlearnOptimizer([{"params": parameters[:2]}, {"params": parameters[2:], **group}], rule="sgd", lr=0.1)


def test_parameters_that_share_memory() -> None:
    buffer = torch.zeros(6)
    parameters = [("a", nn.Parameter(buffer[:4])), ("b", nn.Parameter(buffer[2:]))]
    with pytest.raises(InputError, match=r"parameters\[1\].*clone\(\) one, or make both the same Parameter$"):
        UnlearnOptimizer(parameters, rule="sgd", lr=0.1)


def test_a_mask_needs_names() -> None:
    parameters = named()
    mask = SaliencyMask.from_dict(masks_of(parameters))
    with pytest.raises(InputError, match=r"pass model\.named_parameters\(\)"):
        UnlearnOptimizer([p for _, p in parameters], rule="sgd", lr=0.1, mask=mask)
    with pytest.raises(InputError, match="has no bits for other"):
        UnlearnOptimizer([*parameters, ("other", nn.Parameter(torch.ones(1)))], rule="sgd", lr=0.1, mask=mask)
    optimizer = UnlearnOptimizer(parameters, rule="sgd", lr=0.1, mask=mask)
    with pytest.raises(InputError, match="cannot join after a mask is bound"):
        optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(1)))]})


def test_a_list_of_the_wrong_length() -> None:
    optimizer = UnlearnOptimizer(named(), rule="sgd", lr=0.1)
    with pytest.raises(InputError, match=r"^forget_step: expected 4 gradients, one for each parameter, got 1$"):
        optimizer.forget_step([torch.ones(7, 5)])


def test_a_gradient_of_the_wrong_shape_writes_nothing(rng: torch.Generator) -> None:
    """Also where it belongs to the second of two groups, and the first one's operator call would succeed."""
    parameters = named()
    optimizer = UnlearnOptimizer([{"params": parameters[:2]}, {"params": parameters[2:]}], rule="adam", lr=0.1)
    optimizer.retain_step(gradients(rng, parameters))
    before = snapshot(optimizer)
    grads = gradients(rng, parameters)
    grads[3] = grads[3].reshape(3, 4, 2, 2)
    for step in (optimizer.forget_step, optimizer.retain_step):
        with pytest.raises((InputError, RuntimeError), match="shape"):
            step(grads)
        assert_same_bits(before, snapshot(optimizer))


@pytest.mark.parametrize(
    "grads, message",
    [
        (5, "expected a list of gradients in the parameters' order, got 5"),
        ({"layer0.weight": None}, "expected a list of gradients in the parameters' order, got a dict of layer0.weight"),
        ([None, 1.0, None, None], "the gradient of layer1.weight is 1.0: expected a tensor, or None"),
        ([torch.ones(5, 3).numpy()] * 4, "the gradient of layer0.weight is a numpy.ndarray of float32 and shape"),
    ],
    ids=("number", "dict", "number in it", "array"),
)
@pytest.mark.parametrize("step", ("forget_step", "retain_step", "joint_step"))
def test_what_is_no_list_of_gradients(step: str, grads: Any, message: str) -> None:
    parameters = named(torch.float32)
    optimizer = UnlearnOptimizer(parameters, rule="adam", lr=0.1)
    with pytest.raises(InputError, match=f"^{step}: {message}"):
        getattr(optimizer, step)(grads)
    assert not optimizer.state


@pytest.mark.parametrize(
    "key, value", [("lr", "a"), ("lr", None), ("lr", math.nan), ("betas", 0.5), ("betas", (0.9, 1.0)), ("eps", [1])]
)
def test_settings_edited_to_what_no_step_can_use(key: str, value: Any) -> None:
    """Before anything is written: a schedule that gives NaN would wreck the model in silence."""
    p = nn.Parameter(torch.ones(3))
    optimizer = UnlearnOptimizer([p], rule="adam", lr=0.1)
    optimizer.param_groups[0][key] = value
    with pytest.raises(InputError, match=f"{key}: expected"):
        optimizer.retain_step([torch.ones(3)])
    assert torch.equal(p.detach(), torch.ones(3))


def test_sparse_gradients_are_refused() -> None:
    layer = nn.Embedding(5, 2, sparse=True)
    optimizer = UnlearnOptimizer(layer.named_parameters(), rule="sgd", lr=0.1)
    layer(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(InputError, match=r"^retain_step: the gradient of weight is sparse; make it dense"):
        optimizer.step()


def test_the_config_holds_the_optimizers_arguments() -> None:
    """One dataclass for all methods: an argument that it forgot would be lost without a word."""
    arguments = inspect.signature(UnlearnOptimizer.__init__).parameters
    defaults = {f.name: f.default for f in dataclasses.fields(StepConfig)}
    assert list(defaults) == [n for n in arguments if n not in ("self", "params_or_named_params", "mask")]
    assert all(defaults[n] == a.default for n, a in arguments.items() if n in defaults and n not in ("rule", "lr"))
    parameters = named()
    mask = SaliencyMask.from_dict(masks_of(parameters))
    config = StepConfig(rule="adamw", lr=0.3, slow_rate=0.5, slow_freq=2, dual_state=True, forget_rule="sgd")
    optimizer = config.make_optimizer(parameters, mask)
    assert (optimizer.rule, optimizer.forget_rule, optimizer.slow_freq, optimizer.dual_state) == (
        "adamw",
        "sgd",
        2,
        True,
    )
    group = optimizer.param_groups[0]
    assert (group["lr"], group["slow_rate"]) == (0.3, 0.5)
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_the_config_is_checked_where_it_is_made() -> None:
    with pytest.raises(InputError, match="lr: expected a finite number from 0, got -1"):
        StepConfig(lr=-1.0)
    with pytest.raises(InputError, match="rule: expected one of"):
        StepConfig(rule="lion")


@pytest.mark.parametrize("state", [None, {}, "abc", [1], {"state": {}}, {"param_groups": []}])
def test_a_state_that_is_none(state: Any) -> None:
    optimizer = UnlearnOptimizer([("w", nn.Parameter(torch.ones(2)))], lr=0.1, rule="sgd")
    with pytest.raises(InputError, match="state_dict: expected what an optimizer's state_dict"):
        optimizer.load_state_dict(state)
