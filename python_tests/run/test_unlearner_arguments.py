"""What people pass by mistake: one sentence that says what to pass."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.models import ConvNet, batches, make
from helpers.runs import identical, run, weights
from torch import nn

from unlearn_ext import FisherDiagonal, InputError, Unlearner, evaluation
from unlearn_ext.methods import METHODS, SSD, SFRon, find_method, parse
from unlearn_ext.tasks import ClassConditionalDiffusion, Classification


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("model.pt", r"got 'model.pt': open the file"),
        (Path("folder"), r"got the path 'folder': open the file or folder"),
        (make().state_dict(), r"got a state_dict of 9 tensors: build the network, call its load_state_dict"),
        (ConvNet, r"got the class ConvNet: make one"),
        (None, r"got None"),
        (lambda x: x, r"got a function"),
        ([make()], r"got a list of 1 ConvNet"),
        (Classification(), r"got a Classification"),
        (SimpleNamespace(unet=nn.Linear(2, 2)), r"got a SimpleNamespace: pass its .unet"),
        ({"state_dict": make().state_dict(), "epoch": 3}, r"got a dict of state_dict, epoch"),
    ],
)
def test_no_model(model, words) -> None:
    words = r"model: expected a torch.nn.Module, " + words
    for call in (
        lambda: Unlearner(model, Classification(), "finetune"),
        lambda: FisherDiagonal(model, Classification()),
        lambda: SSD().run(model, Classification(), [], []),
        lambda: evaluation.predict(model, batches(1, 2, seed=0)),
    ):
        with pytest.raises(InputError, match=words):
            call()


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("classification", r"expected a Task, such as unlearn_ext.tasks.Classification\(\), got 'classification'"),
        (Classification, r"got the class Classification and not an instance: pass Classification\(...\)"),
        (ClassConditionalDiffusion, r"pass ClassConditionalDiffusion\(...\)"),
        (None, r"got None"),
        (nn.CrossEntropyLoss(), r"got a CrossEntropyLoss"),
    ],
)
def test_no_task(task, words) -> None:
    for call in (
        lambda: Unlearner(make(), task, "finetune"),
        lambda: FisherDiagonal(make(), task),
        lambda: SSD().run(make(), task, [], []),
    ):
        with pytest.raises(InputError, match="task: .*" + words):
            call()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (SFRon, r"got the class SFRon and not an instance: pass SFRon\(...\)"),
        (None, r"expected a Method, such as SFRon\(\) or its name 'sfron', got None"),
        ({"lr": 0.1}, r"got a dict of lr"),
        (SFRon.preset, r"got a method"),
        (SSD(), r"SSD makes no gradient step: call SSD\(\).run"),
        (SSD, r"SSD makes no gradient step: call SSD\(\).run"),
        (torch.optim.SGD, r"got the class SGD"),
    ],
)
def test_no_method(method, words) -> None:
    with pytest.raises(InputError, match="method: .*" + words):
        Unlearner(make(), Classification(), method)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("sfrn", "sfron"),
        ("SFRon", "sfron"),
        ("SalUn", "salun"),
        ("random-label", "random_label"),
        ("Bad Teacher", "bad_teacher"),
        ("NegativeGradientPlus", "negative_gradient_plus"),
    ],
)
def test_a_method_of_another_spelling(name, meant) -> None:
    with pytest.raises(InputError, match=f"no method '{name}', perhaps {meant} is meant: choose from finetune, "):
        Unlearner(make(), Classification(), name)


def test_names_and_presets() -> None:
    with pytest.raises(InputError, match="no method 'abcdefg': choose from"):
        find_method("abcdefg")
    with pytest.raises(InputError, match="no preset 'CIFAR10_resnet18', perhaps cifar10-resnet18 is meant"):
        find_method("sfron@CIFAR10_resnet18")
    with pytest.raises(InputError, match="as text, such as 'sfron', got the class SFRon"):
        parse(SFRon)
    for name, kind in METHODS.items():
        assert type(find_method(name)) is kind
    method = SFRon()
    assert find_method(method) is method


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("gpu", r"expected one such as 'cpu', 'cuda' or 'cuda:0', got 'gpu'"),
        (3.5, r"got 3.5"),
        ("meta", r"'meta' holds no numbers"),
        ("mps", r"this torch cannot use 'mps': choose 'cpu'"),
        pytest.param("cuda", r"sees no GPU, so 'cuda' cannot be used: choose 'cpu'", id="cuda"),
        ("cuda:99", r"sees no GPU|expected an index below"),
    ],
)
def test_no_device(device, words) -> None:
    if (device == "cuda" and torch.cuda.is_available()) or (device == "mps" and torch.backends.mps.is_available()):
        pytest.skip("the device is there")
    for call in (
        lambda: Unlearner(make(), Classification(), "finetune", device=device),
        lambda: evaluation.predict(make(), batches(1, 2, seed=0), device=device),
    ):
        with pytest.raises(InputError, match="device: .*" + words):
            call()


def test_devices_of_every_form() -> None:
    for device in ("cpu", torch.device("cpu"), "cpu:0"):
        assert Unlearner(make(), Classification(), "finetune", device=device).device.type == "cpu"


@pytest.mark.parametrize("name", ["evaluate", "progress"])
def test_no_function(name: str) -> None:
    model = make()
    before = weights(model)
    with pytest.raises(InputError, match=f"{name}: expected a function, got True"):
        run(model, **{name: True}, evaluate_every=1)
    assert identical(weights(model), before)


@pytest.mark.parametrize("identity", ["abc", ["a"], 3])
def test_no_identity(identity) -> None:
    with pytest.raises(InputError, match="identity: expected a dict of names and texts, got"):
        Unlearner(make(), Classification(), "sfron", identity=identity)


def test_no_interval_of_the_log() -> None:
    with pytest.raises(InputError, match="log_every: expected an integer from 1, got None"):
        Unlearner(make(), Classification(), "finetune").run(retain=[], log_every=None)


@pytest.mark.parametrize("precision", [None, [], {}, 16, torch.bfloat16])
def test_no_precision(precision) -> None:
    with pytest.raises(InputError, match="mixed_precision: expected one of no, bf16, fp16, got"):
        Unlearner(make(), Classification(), "sfron", mixed_precision=precision)
