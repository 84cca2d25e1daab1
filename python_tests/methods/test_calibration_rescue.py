"""A calibrated run that meets NaN gives the model the best weights that it holds."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.calibrated import SHORT, run, sets
from helpers.models import make
from torch import nn

from unlearn_ext import NonFiniteError
from unlearn_ext.methods import GradientAscent, NegativeGradientPlus, SFRon
from unlearn_ext.methods.calibration import UnseenLosses


class Unmet(UnseenLosses):
    """Goes on to the last iteration."""

    @staticmethod
    def critical(n: int, m: int) -> float:
        return -1.0


class Poisoned(nn.Module):
    """Its outputs are NaN in train mode from a pass on, as those of a model that overflows."""

    def __init__(self, passes: int):
        super().__init__()
        self.inner, self.left = make(), passes

    def forward(self, x):
        self.left -= self.training
        return self.inner(x) if self.left >= 0 else self.inner(x) * float("nan")


def states(model: nn.Module, kept: dict):
    def keep(net: nn.Module, done: int) -> None:
        kept[done] = copy.deepcopy(net.state_dict())

    return {"model": model, "evaluate": keep, "evaluate_every": 1}


def same(model: nn.Module, state: dict) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("table", [torch.ones(1).expand(4), torch.eye(4).to_sparse()], ids=["expanded", "sparse"])
def test_buffers_that_nothing_can_be_copied_into(table) -> None:
    model = Poisoned(3)
    model.register_buffer("table", table)
    method = SFRon(**SHORT)
    method.calibration = Unmet(1, 16)
    with pytest.raises(NonFiniteError, match="gone back to its weights"):
        run(method, model=model)
    assert torch.equal(model.table.to_dense(), table.to_dense())


@pytest.mark.parametrize("kind", [SFRon, NegativeGradientPlus])
@pytest.mark.parametrize("after", [2, 5], ids=["before a look", "after looks"])  # two passes are before the first step
def test_a_loss_that_is_nan(kind, after) -> None:
    model, kept = Poisoned(after), {}
    start = copy.deepcopy(model.state_dict())
    method = kind(**SHORT)
    method.calibration = Unmet(1, 16)
    with pytest.raises(
        NonFiniteError, match=r"^iteration \d: .* gone back to its weights after (\d) iterations"
    ) as got:
        run(method, **states(model, kept))
    at = int(str(got.value).rpartition("after ")[2].split()[0])
    best = min(method.calibration.path, key=lambda look: (not look["met"], look["score"], -look["iteration"]))
    assert at == best["iteration"]
    assert same(model, {0: start, **kept}[at])


class Raising(Poisoned):
    """A model that looks at its outputs itself, as torch.autograd.set_detect_anomaly looks at gradients."""

    def forward(self, x):
        output = super().forward(x)
        if not bool(torch.isfinite(output).all()):
            raise ValueError("NaN in the output")
        return output


def test_nan_that_comes_as_another_error() -> None:
    model, kept = Raising(7), {}
    start = copy.deepcopy(model.state_dict())
    method = SFRon(**SHORT)
    method.calibration = Unmet(1, 16)
    with pytest.raises(ValueError, match="NaN in the output") as got:
        run(method, **states(model, kept))
    best = min(method.calibration.path, key=lambda look: (not look["met"], look["score"], -look["iteration"]))
    at = best["iteration"]
    assert max(kept) > at and same(model, {0: start, **kept}[at])
    if hasattr(got.value, "add_note"):
        assert got.value.__notes__ == [f"the model has gone back to its weights after {at} iterations"]


def test_a_gradient_that_is_not_finite() -> None:
    model = make()
    start = copy.deepcopy(model.state_dict())
    calls = 0

    def spoil(gradient):
        nonlocal calls
        calls += 1
        return gradient * (float("inf") if calls > 4 else 1.0)

    model.head.weight.register_hook(spoil)
    with pytest.raises(NonFiniteError, match=r"gone back to its weights after \d iterations"):
        run(GradientAscent(**{**SHORT, "calibrate_every": 6}), model=model)
    assert same(model, start)


def test_nan_before_anything_has_changed() -> None:
    data = sets()
    data["unseen"][0][0][0] = float("nan")
    model = make()
    with pytest.raises(NonFiniteError) as got:
        run(SFRon(**{**SHORT, "gamma": None}), data, model)
    assert "gone back" not in str(got.value) and same(model, make().state_dict())
