"""What a run does hangs on no mode that its caller has set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from helpers.models import batches, make
from helpers.runs import identical, method, weights

from unlearn_ext import Unlearner
from unlearn_ext.tasks import Classification


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def gradients_off() -> Iterator[None]:
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)


@contextlib.contextmanager
def autocast_that_was_used() -> Iterator[None]:
    """Its cache holds half copies of weights as they were before."""
    with torch.autocast("cpu", torch.bfloat16):
        yield


MODES = {
    "no_grad": torch.no_grad,
    "gradients off": gradients_off,
    "inference": torch.inference_mode,
    "autocast": autocast_that_was_used,
    "deterministic": deterministic,
    "default dtype": default_dtype,
}


def outcome(precision: str, mode, made_within: bool):
    model = make(dropout=0.3)
    data = {"forget": batches(2, 6, seed=1), "retain": batches(3, 6, seed=2)}
    settings = method(iterations=5, mask_scope="all", protect=True)
    seen = []

    def evaluate(model, step):
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        model(data["forget"][0][0])  # fills autocast's cache

    with mode() if made_within else contextlib.nullcontext():
        unlearner = Unlearner(model, Classification(), settings, mixed_precision=precision, ema_decay=0.5, device="cpu")
    torch.manual_seed(7)
    with mode():
        result = unlearner.run(**data, evaluate=evaluate, evaluate_every=2)
        now = torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    assert set(seen) == {now}, "an evaluation sees the caller's modes"
    return weights(model), result


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_the_run_is_the_same(mode, precision) -> None:
    expected, result = outcome(precision, contextlib.nullcontext, False)
    for made_within in (False, True):
        found, other = outcome(precision, mode, made_within)
        assert identical(expected, found) and identical(result.ema, other.ema)
        assert result.history == other.history


def test_batches_that_were_made_in_inference_mode() -> None:
    def trained(data: dict) -> dict:
        model = make()
        Unlearner(model, Classification(), method(iterations=3, gamma=None)).run(**data)
        return weights(model)

    with torch.inference_mode():
        inference = {"forget": batches(2, 6, seed=1), "retain": batches(3, 6, seed=2)}
    assert inference["forget"][0][0].is_inference()
    assert identical(trained(inference), trained({"forget": batches(2, 6, seed=1), "retain": batches(3, 6, seed=2)}))


def test_a_default_device_elsewhere() -> None:
    """``meta`` stands in for a GPU: what has no device of its own given would land there."""
    model = make()
    unlearner = Unlearner(model, Classification(), method(iterations=3, gamma=None, max_norm=None), device="cpu")
    data = {"forget": batches(2, 6, seed=1), "retain": batches(3, 6, seed=2)}
    with torch.device("meta"):
        unlearner.run(**data)
    expected = make()
    Unlearner(expected, Classification(), method(iterations=3, gamma=None, max_norm=None)).run(**data)
    assert identical(weights(model), weights(expected))


class Checkpointing(torch.nn.Module):
    """The same network, whose backward passes compute activations again."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(self.model, x, use_reentrant=False)


def test_half_copies_of_a_backward_pass_do_not_outlive_its_step() -> None:
    """Of weights as they were before the step; autocast would take them for those of the next forward pass."""
    left = []
    for wrapped in (False, True):
        model = make()
        data = {"forget": batches(2, 6, seed=1), "retain": batches(3, 6, seed=2)}
        whole = Checkpointing(model) if wrapped else model
        Unlearner(whole, Classification(), method(iterations=5), mixed_precision="bf16").run(**data)
        left.append({name: p.detach() for name, p in model.named_parameters()})  # BatchNorm's statistics move twice
    assert identical(*left)
