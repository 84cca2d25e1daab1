"""What a run says of forgetting that eval mode does not see, because of batch normalisation."""

from __future__ import annotations

import pytest
import torch
from helpers.models import make
from helpers.outspoken import DATA, QUIET, Vector, clusters, go, normed, trained
from torch import nn

from unlearn_ext.run.signs import hidden


def test_forgotten_in_train_mode_alone() -> None:
    """A forget batch is one class, whose statistics train mode takes; eval mode has those of all retained samples."""
    x, y = clusters(160)
    model = trained(normed(), x, y)
    chosen = y == 3
    data = {"forget": [(x[chosen], y[chosen])], "retain": [(x[~chosen], y[~chosen])]}
    settings = "lr=0.02,momentum=0.9,iterations=12,batch_norm_statistics=retain"
    found = go(f"negative_gradient_plus:{settings}", data, model)
    model.eval()
    right = float((model(x[chosen]).argmax(1) == y[chosen]).double().mean())
    assert found.forget_eval["samples"] == int(chosen.sum()) and found.forget_eval["accuracy"] == right
    expected = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
    assert found.forget_eval["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert right > 0.5 and "batch_norm" in found.warnings


def test_only_models_whose_batch_norm_trains_are_looked_at() -> None:
    assert go(QUIET).forget_eval["samples"] == 6
    assert go(f"{QUIET},freeze_batch_norm=true").forget_eval is None
    assert go("finetune:iterations=1,lr=1e-3", {"retain": DATA["retain"]}).forget_eval is None
    x, y = clusters(24)
    plain = go(QUIET, {"forget": [(x[:8], y[:8])], "retain": [(x[8:], y[8:])]}, make(Vector, size=4))
    assert plain.forget_eval is None


def test_the_look_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for looks in (True, False):
        model = make(dropout=0.5)
        if not looks:
            monkeypatch.setattr("unlearn_ext.run.watching.has_batch_norm", lambda model: False)
        found = go(QUIET, model=model)
        assert (found.forget_eval is not None) == looks
        states.append({**model.state_dict(), "generator": torch.get_rng_state(), "mode": torch.tensor(model.training)})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("forget", "now", "accuracy", "retain", "replaces", "warned"),
    [
        (3.0, 0.05, 0.9, 0.1, False, True),
        (3.0, 0.05, 0.9, None, False, True),
        (3.0, 2.9, 0.1, 0.1, False, False),  # forgotten in both
        (3.0, 0.05, None, 0.1, False, False),
        (0.9, 0.1, 1.0, 0.8, False, False),  # dropout makes all losses larger
        (0.3, 0.05, 1.0, 0.01, False, False),  # not forgotten in train mode either
        (0.1, 4.0, 1.0, 0.1, True, True),  # towards wrong labels
        (0.1, 0.1, 0.0, 0.1, True, False),
        (3.0, 4.0, 1.0, 0.1, True, False),  # not learned in train mode either
    ],
)
def test_when_train_mode_hides_what_eval_mode_knows(forget, now, accuracy, retain, replaces, warned) -> None:
    assert (hidden(forget, now, accuracy, retain=retain, replaces=replaces) is not None) == warned
