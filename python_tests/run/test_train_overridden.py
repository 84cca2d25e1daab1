"""Modules whose train() does more than set a flag, as loralib's layers, which hold merged weights in eval mode."""

from __future__ import annotations

import pytest
import torch
from helpers.models import batches, make
from torch import Tensor, nn

from unlearn_ext import Result, Unlearner, evaluation
from unlearn_ext.distributed.modes import keeping_modes
from unlearn_ext.methods import SSD, parse
from unlearn_ext.saliency import FisherDiagonal
from unlearn_ext.saliency.gradient import GradientSum
from unlearn_ext.tasks import Classification


class Adapted(nn.Linear):
    """In eval mode the adapter stands in the weights, and none of it is trained."""

    merge_weights = True

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.zeros(outputs, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Adapted:
        super().train(mode)
        if self.merge_weights and self.merged == mode:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        adapter = 0 if self.merged else x @ self.down.T @ self.up.T
        return super().forward(x) + adapter


class Block(nn.Sequential):
    """Its train() reaches its layers."""

    def train(self, mode: bool = True) -> Block:
        return super().train(mode)


def network() -> nn.Module:
    return Block(nn.Flatten(), Adapted(50, 6), nn.ReLU(), nn.Dropout(0.1), Adapted(6, 4))


SETS = {"forget": batches(2, 6, seed=1), "retain": batches(2, 6, seed=2)}


@pytest.mark.parametrize("training", [True, False])
def test_adapters_are_trained(training) -> None:
    model = make(network).train(training)
    seen = []

    def look(net: nn.Module, done: int) -> None:
        seen.append(net[1].merged)

    method = parse("negative_gradient_plus:iterations=4,lr=0.1")
    Unlearner(model, Classification(), method).run(**SETS, evaluate=look, evaluate_every=1)
    assert seen == [True] * 4
    assert all(bool(model[i].up.any()) for i in (1, 4))
    assert all(module.training == training for module in model.modules())
    assert all(model[i].merged != training for i in (1, 4))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [FisherDiagonal, GradientSum])
def test_saliency_is_measured_of_adapters_beside_the_weights(training, kind) -> None:
    merging, apart = make(network).train(training), make(network)
    for layer in (apart[1], apart[4]):
        layer.merge_weights = False
    found, expected = (kind(model, Classification()).measure(SETS["forget"]).sums for model in (merging, apart))
    assert all(bool(total.any()) for name, total in found.items() if name.endswith("up"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(total, expected[name]) for name, total in found.items())
    assert all(merging[i].merge_weights and merging[i].merged != training for i in (1, 4))


@pytest.mark.parametrize("training", [True, False])
def test_a_resumed_run_is_the_same_run(tmp_path, training) -> None:
    def run(folder: str, **resumed) -> tuple[nn.Module, Result]:
        model = make(network).train(training)
        unlearner = Unlearner(model, Classification(), "sfron:iterations=4,lr=0.1", ema_decay=0.9)
        return model, unlearner.run(**SETS, output_dir=tmp_path / folder, checkpointing_steps=2, **resumed)

    (whole, result), (model, other) = run("a"), run("b", resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), model.parameters(), strict=True))
    assert result.history == other.history
    assert all(torch.equal(average, other.ema[name]) for name, average in result.ema.items())


def test_what_is_merged_into_frozen_weights_is_dampened_beside_them() -> None:
    model = make(network)
    for layer in (model[1], model[4]):
        layer.up.data += 1.0
    before, ups = model.train()[1].weight.clone(), model[1].up.clone()
    SSD(alpha=0.1, lambd=0.1).run(model.eval(), Classification(), **SETS)
    assert model[1].merged and not torch.equal(model[1].up, ups)
    assert torch.allclose(model.train()[1].weight, before, atol=1e-6)


def test_what_was_frozen_in_eval_mode_is_so_again() -> None:
    model = make(network).train()
    model[1].eval()
    model[3].eval()
    model[4].up.data += 1.0
    before = model[4].weight.clone()
    evaluation.predict(model, SETS["forget"])
    with keeping_modes(model):
        model.eval()
        assert model[4].merged
    assert [module.training for module in model] == [True, False, True, False, True]
    assert [model[1].merged, model[4].merged] == [True, False]
    assert torch.allclose(model[4].weight, before, atol=1e-6)
