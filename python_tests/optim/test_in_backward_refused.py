"""Steps in the backward pass that break or are refused: gradients that are not finite, missing or in parts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers.in_backward import Net, Spoilt, assert_same, everything, loss_of, optimizer_of, steps
from helpers.models import ConvNet, batches, make
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unlearn_ext import InputError, NonFiniteError, SaliencyMask, Unlearner, UnlearnOptimizer
from unlearn_ext.methods import SFRon
from unlearn_ext.tasks import Classification
from unlearn_ext.utils import grad_hooks

# --- What is not finite -----------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_ends_it_in_mid_step(monkeypatch) -> None:
    monkeypatch.setattr(grad_hooks, "_WAITING", {"cpu": 1})  # as large tensors arrive: one at a time
    model = Spoilt()
    optimizer = optimizer_of(model, rule="momentum", momentum=0.9)
    with optimizer.step_in_backward("retain"):
        model().backward()
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    model.factor = float("inf")
    words = (
        r"^retain_step: the gradient of middle is not finite, and 1 of 3 parameters have made a step that the others "
        r"have not \(the last was last\): go on from a checkpoint"
    )
    with pytest.raises(NonFiniteError, match=words), optimizer.step_in_backward("retain"):
        model().backward()
    now = model.state_dict()
    assert [n for n in weights if not torch.equal(weights[n], now[n])] == ["last"]
    model.factor = 1.0
    optimizer.zero_grad()
    for step in (
        optimizer.step,
        lambda: optimizer.retain_step([torch.ones(3)] * 3),
        lambda: optimizer.forget_step([torch.ones(3)] * 3),
        lambda: optimizer.step_in_backward("retain").__enter__(),
    ):
        with pytest.raises(InputError, match=r"^1 of 3 parameters have made .*: load weights and optimizer of a check"):
            step()
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    other = Spoilt()
    twin = optimizer_of(other, rule="momentum", momentum=0.9)
    with optimizer.step_in_backward("retain"):
        model().backward()
    for _ in range(2):
        with twin.step_in_backward("retain"):
            other().backward()
    assert_same(everything(model, optimizer), everything(other, twin))


def test_nothing_is_broken_where_the_first_gradient_is_not_finite() -> None:
    model = Net()
    optimizer = optimizer_of(model, rule="adam")
    before = everything(model, optimizer)
    with pytest.raises(NonFiniteError, match="and no weight was changed"), optimizer.step_in_backward("forget"):
        (loss_of(model, 0) * float("inf")).backward()
    assert_same(before, everything(model, optimizer))
    optimizer.zero_grad()
    steps(optimizer, model, True, 1)


def test_a_masked_out_gradient_need_not_be_finite() -> None:
    model = Spoilt()
    keep = {"first": torch.ones(3).bool(), "middle": torch.zeros(3).bool(), "last": torch.ones(3).bool()}
    optimizer = UnlearnOptimizer(model.named_parameters(), rule="sgd", lr=0.1, mask=SaliencyMask.from_dict(keep))
    model.factor = float("inf")
    with optimizer.step_in_backward("forget"):
        model().backward()
    assert torch.equal(model.middle, torch.ones(3)) and not torch.equal(model.first, torch.ones(3))


def test_on_a_device_it_is_told_at_the_next_look() -> None:
    model = Net()
    optimizer = optimizer_of(model, rule="sgd")
    with optimizer.step_in_backward("retain"):
        loss_of(model, 0).backward()
    optimizer.non_finite = torch.tensor(True)  # as a step on a GPU leaves it
    with pytest.raises(NonFiniteError, match="left out weights whose gradient was not finite, and others moved: go on"):
        optimizer.raise_if_non_finite()
    with pytest.raises(InputError, match="load weights and optimizer of a checkpoint"):
        optimizer.retain_step([torch.ones_like(p) for p in model.parameters()])


class Failing(ConvNet):
    """The head's bias moves before the gradient of the weight beside it is found not to be finite."""

    fails_at = 10**9
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.training and self.calls == self.fails_at:
            features = torch.relu(self.norm(self.conv(x))).mean(dim=(2, 3))
            spoilt = features.detach().requires_grad_(True)
            weight = self.head.weight + 0
            weight.register_hook(lambda g: g * float("nan"))
            return nn.functional.linear(spoilt, weight, self.head.bias)
        return super().forward(x)


def test_a_run_that_broke_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(grad_hooks, "_WAITING", {"cpu": 1})
    settings = {"rule": "momentum", "lr": 0.02, "momentum": 0.9, "iterations": 6, "max_norm": 1.0, "gamma": 0.9}
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}

    def unlearner(model: nn.Module) -> Unlearner:
        return Unlearner(model, Classification(), SFRon(**settings), optimizer_in_backward=True)

    straight = make(Failing)
    unlearner(straight).run(**data)
    failing = make(Failing)
    failing.fails_at = 12  # two looks, then two passes an iteration: the retain pass of iteration 4
    with pytest.raises(NonFiniteError, match=r"^iteration 4: retain_step: the gradient of head.weight is not finite"):
        unlearner(failing).run(**data, output_dir=tmp_path, checkpointing_steps=2)
    resumed = make(Failing)
    unlearner(resumed).run(**data, output_dir=tmp_path, resume_from_checkpoint="latest")
    assert_same(straight.state_dict(), resumed.state_dict())


# --- Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "arguments", "words"),
    [
        ({"update": "joint"}, {}, "update='joint' needs the gradients of both sides at once: leave one of them out"),
        ({}, {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps above 1 adds up whole gradients"),
        ({}, {"mixed_precision": "fp16"}, "mixed_precision='fp16' looks at all gradients before a step"),
    ],
)
def test_what_needs_whole_gradients_is_refused(settings: dict, arguments: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Unlearner(make(), Classification(), SFRon(**settings), optimizer_in_backward=True, **arguments)


def test_gradients_that_are_there_or_come_in_parts_or_not_at_all(monkeypatch) -> None:
    monkeypatch.setattr(grad_hooks, "_WAITING", {"cpu": 1})
    model = Net()
    optimizer = optimizer_of(model, rule="sgd")
    loss_of(model, 0).backward()
    with pytest.raises(InputError, match="starts without gradients"), optimizer.step_in_backward("retain"):
        pass
    optimizer.zero_grad()
    with pytest.raises(InputError, match="every gradient is None"), optimizer.step_in_backward("retain"):
        pass
    words = r"^the gradient of .* came in parts .*use_reentrant=False"
    for twice in (True, False):  # two passes in a block; a tied weight in two blocks that are recomputed one by one
        model = Net()
        optimizer = optimizer_of(model, rule="sgd")
        x = torch.ones(2, 5, requires_grad=True)
        with pytest.raises(InputError, match=words), optimizer.step_in_backward("retain"):
            if twice:
                loss_of(model, 0).backward()
                loss_of(model, 1).backward()
            else:
                y = checkpoint(nn.Sequential(model.first, model.second), x, use_reentrant=True)
                checkpoint(model.third, y, use_reentrant=True).sum().backward()
        with pytest.raises(InputError, match="load weights and optimizer"):
            optimizer.step_in_backward("retain").__enter__()


def test_several_processes_are_refused(monkeypatch) -> None:
    optimizer = optimizer_of(Net(), rule="sgd")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(InputError, match="several processes reduce their gradients"):
        optimizer.step_in_backward("retain").__enter__()


def test_a_sparse_gradient_is_named() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(4, 2, sparse=True)})
    optimizer = optimizer_of(model, rule="sgd")
    with pytest.raises(InputError, match=r"gradient of table\.weight is sparse"), optimizer.step_in_backward("retain"):
        model["table"](torch.tensor([1])).sum().backward()


def test_hooks_are_gone_afterwards() -> None:
    model = Net()
    optimizer = optimizer_of(model, rule="sgd")
    steps(optimizer, model, True, 1)
    loss_of(model, 0).backward()
    assert model.first.weight.grad is not None
