"""Every method that classification allows on a text and an image classifier of transformers."""

from __future__ import annotations

import pytest
import torch
from helpers.transformer_nets import NETS, loader

from unlearn_ext import Unlearner, evaluation
from unlearn_ext.methods import METHODS, SSD, parse
from unlearn_ext.tasks import Classification

METHODS_OF_CLASSIFIERS = [name for name, method in METHODS.items() if "classification" in method.row.tasks]
SETTINGS = {"scrub": "epochs=1,msteps=1", "sfron": "iterations=2,gamma=0.5,forget_alpha=0.1"}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", METHODS_OF_CLASSIFIERS)
def test_a_run(net, name) -> None:
    make = NETS[net][0]
    model, before = make(), dict(make().named_parameters())
    method = parse(f"{name}:lr=0.01,{SETTINGS.get(name, 'iterations=2')}")
    if name == "bad_teacher":
        method.random_model = make(seed=1)
    sets = {"forget": loader(net, 9, seed=1, shuffle=True), "retain": loader(net, 14, seed=2, shuffle=True)}
    if method.learns:
        sets["learn"] = loader(net, 8, seed=3)
    if method.needs_unseen:
        sets["unseen"] = loader(net, 20, seed=4)
    result = Unlearner(model, Classification(), method).run(**sets)
    assert result.counts["iterations"] == (7 if name == "scrub" else 2)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert any(not torch.equal(p, before[key]) for key, p in model.named_parameters())


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("target", [None, 0.0])
def test_calibrated(net, target) -> None:
    method = parse("sfron:lr=0.05,iterations=4,gamma=none,forget_alpha=auto,calibrate_every=2")
    method = type(method)(**{**method.settings(), "target_accuracy": target})
    sets = {"forget": loader(net, 18, 1), "retain": loader(net, 14, 2), "unseen": loader(net, 20, 4)}
    path = Unlearner(NETS[net][0](), Classification(), method).run(**sets).calibration["path"]
    assert [entry["iteration"] for entry in path][:2] == [0, 2]
    if target is not None:
        logits, labels = evaluation.predict(NETS[net][0](), loader(net, 18, 1))
        assert path[0]["accuracy"] == evaluation.accuracy(logits, labels)


@pytest.mark.parametrize("net", NETS)
def test_dampening(net) -> None:
    found = SSD(alpha=1.2).run(NETS[net][0](), Classification(), loader(net, 9, 1), loader(net, 14, 2))
    assert 0 < found.counts["dampened"] < found.counts["trainable"]
