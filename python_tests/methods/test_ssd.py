"""Selective synaptic dampening: against a plain transcription, on digits, and what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.models import ConvNet, WithUnused, batches, make
from helpers.process_state import STATES
from sklearn.datasets import load_digits
from torch import Tensor, nn

from unlearn_ext.demo.training import train_classifier
from unlearn_ext.errors import InputError, NonFiniteError
from unlearn_ext.evaluation import accuracy
from unlearn_ext.methods.ssd import SSD, dampening_factor
from unlearn_ext.tasks import Classification


def plain_fisher(model: nn.Module, groups: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Sums of squared gradients of mean losses, in eval mode."""
    model = copy.deepcopy(model).eval()
    sums = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in groups:
        loss = nn.functional.cross_entropy(model(x), y)
        for total, g in zip(sums, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True), strict=True):
            if g is not None:
                total += g**2
    return sums


def samples_of(data: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(x[i : i + 1], y[i : i + 1]) for x, y in data for i in range(len(y))]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("alpha, lambd", [(1.0, 1.0), (1.5, 0.5), (1.2, 1.8), (1.5, 0.0)])
def test_equals_a_plain_transcription(per_sample: bool, alpha: float, lambd: float) -> None:
    model = make(WithUnused).double()
    forget, retain = batches(2, 6, seed=1, dtype=torch.float64), batches(3, 8, seed=2, dtype=torch.float64)
    sets = [samples_of(data) if per_sample else data for data in (forget, retain)]
    f, r = (plain_fisher(model, data) for data in sets)
    counts = [len(data) for data in sets]
    want, factors = [], []
    for p, s_f, s_r in zip(model.parameters(), f, r, strict=True):
        own = []
        for a, b in zip(s_f.flatten().tolist(), s_r.flatten().tolist(), strict=True):
            f_f, f_all = a / counts[0], (a + b) / (counts[0] + counts[1])
            own.append(min(lambd * f_all / f_f, 1.0) if f_f > alpha * f_all else 1.0)
        want.append(p.detach() * torch.tensor(own, dtype=torch.float64).reshape(p.shape))
        factors += own
    touched = [factor < 1.0 for factor in factors]
    before = copy.deepcopy(model)
    result = SSD(alpha=alpha, lambd=lambd, per_sample=per_sample).run(model, Classification(), forget, retain)
    assert 0 < sum(touched) < len(touched)
    for (name, p), w in zip(model.named_parameters(), want, strict=True):
        assert torch.allclose(p, w, rtol=1e-11, atol=0.0), name
    chosen = result.mask.unpack()
    assert torch.cat([m.flatten() for m in chosen.values()]).tolist() == touched
    for (name, p), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p[~chosen[name]], old[~chosen[name]]), "a weight that is not chosen keeps its bits"
    assert result.counts == {
        "trainable": len(touched),
        "dampened": sum(touched),
        "forget": counts[0],
        "retain": counts[1],
    }
    assert result.mean_factor == pytest.approx(math.fsum(f for f in factors if f < 1.0) / sum(touched), rel=1e-9)
    assert result.settings == {"method": "ssd", "alpha": alpha, "lambd": lambd, "per_sample": per_sample, "chunk": 8}
    assert result.timings.keys() == {"fisher", "dampening"} and result.backend in ("native", "python")


def test_factors_by_hand() -> None:
    """F_f is [4, 4, 4, 0, 1], F_all [1, 3, 4, 5, 0.5] · 10 batches of 2 + 8."""
    forget = torch.tensor([8.0, 8.0, 8.0, 0.0, 2.0])
    retain = torch.tensor([2.0, 22.0, 32.0, 50.0, 3.0])
    got = dampening_factor(forget, retain, 2, 8, alpha=1.25, lambd=0.5)
    assert got.tolist() == pytest.approx([0.125, 0.375, 1.0, 1.0, 0.25])
    # 4 is not more than 1 · 4, nor 0 more than 0
    assert dampening_factor(forget[2:3], retain[2:3], 2, 8, alpha=1.0, lambd=0.5).item() == 1.0
    assert dampening_factor(torch.zeros(1), torch.zeros(1), 2, 8, alpha=0.0, lambd=0.0).item() == 1.0
    # Between alpha and lambda the factor would be above 1.
    assert dampening_factor(forget[1:2], retain[1:2], 2, 8, alpha=1.25, lambd=9.0).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_rounded_once(dtype: torch.dtype) -> None:
    model = make().to(dtype)
    forget, retain = batches(1, 8, seed=1, dtype=dtype), batches(2, 8, seed=2, dtype=dtype)
    before = copy.deepcopy(model)
    chosen = SSD(alpha=1.5).run(model, Classification(), forget, retain).mask.unpack()
    f, r = ([s.float() for s in plain_fisher(before.float(), [(x.float(), y) for x, y in d])] for d in (forget, retain))
    close = []
    for (name, p), old, a, b in zip(model.named_parameters(), before.parameters(), f, r, strict=True):
        assert p.dtype == dtype
        factor = dampening_factor(a, b, 1, 2, alpha=1.5, lambd=1.0)
        same = chosen[name] == (factor < 1)  # gradients of half weights are rounded as well
        close.append(((p.float() - old * factor).abs() <= 0.1 * old.abs() + 1e-3) | ~same)
    assert torch.cat([c.flatten() for c in close]).double().mean() > 0.95


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels).float().div(16).reshape(-1, 1, 8, 8), torch.from_numpy(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images[:1437], labels[:1437], images[1437:], labels[1437:]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    convolutions = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU())
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_digit_is_forgotten_and_the_others_stay(seed: int, digit: int = 3) -> None:
    x, y, x_test, y_test = digits()
    model = train_classifier(network(seed), x, y, epochs=12, seed=seed)
    chosen, others = y == digit, y_test != digit

    def measured() -> tuple[float, float]:
        with torch.no_grad():
            return accuracy(model(x[chosen]), y[chosen]), accuracy(model(x_test[others]), y_test[others])

    before = measured()
    sets = [list(zip(x[part].split(32), y[part].split(32), strict=True)) for part in (chosen, ~chosen)]
    result = SSD(alpha=4.0).run(model, Classification(), *sets)
    after = measured()
    print(f"digit {digit}, seed {seed}: FA {before[0]:.3f} to {after[0]:.3f}, others {before[1]:.3f} to {after[1]:.3f}")
    assert before[0] > 0.98 and after[0] <= 0.02
    assert after[1] >= before[1] - 0.02
    assert 0.01 < result.mask.density < 0.15 and not model.training


def test_frozen_weights_buffers_and_modes_stay() -> None:
    model = make(ConvNet)
    model.conv.weight.requires_grad_(False)
    model.train()
    model.dropout.eval()
    before = copy.deepcopy(model.state_dict())
    result = SSD(alpha=1.0).run(model, Classification(), batches(1, 8, seed=1), batches(2, 8, seed=2))
    after = model.state_dict()
    assert "conv.weight" not in result.mask.names
    for name in ("conv.weight", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(after[name], before[name]), name
    assert model.training and model.norm.training and not model.dropout.training
    assert all(p.grad is None for p in model.parameters())


def test_progress() -> None:
    seen = []
    forget, retain = batches(1, 8, seed=1), batches(2, 8, seed=2)
    SSD(alpha=1.0).run(make(), Classification(), forget, retain, progress=lambda *stage: seen.append(stage))
    assert seen == [("Fisher, forget set", 1, 1), ("Fisher, retain set", 1, 2), ("Fisher, retain set", 2, 2)]


@pytest.mark.parametrize("values", [{"alpha": -1.0}, {"alpha": math.inf}, {"lambd": math.nan}, {"lambd": "1"}])
def test_settings_that_are_refused(values: dict) -> None:
    with pytest.raises(InputError, match=f"{next(iter(values))}: expected a finite number from 0, got"):
        SSD(**values)


def test_runs_that_are_refused_change_nothing() -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    forget, retain = batches(1, 8, seed=1), batches(2, 8, seed=2)
    broken = [(x * math.nan, y) for x, y in retain]
    for method, sets, error, message in (
        (
            SSD(alpha=3.0),
            (forget, retain),
            InputError,
            r"alpha=3 can dampen no weight: F_f is at most 3 times .* 1 of 3",
        ),
        (SSD(alpha=2.9999), (forget, retain), InputError, "alpha=2.9999 dampens no weight.* no F_f exceeds that many"),
        (SSD(alpha=1.0, lambd=2.9999), (forget, retain), InputError, "lambd=2.9999 dampens no weight.* lower it"),
        (SSD(alpha=1.0, lambd=5.0), (forget, retain), InputError, "lambd=5 can dampen no weight: F_f is at most 3 tim"),
        (SSD(alpha=1.0), ([], retain), InputError, "the forget set is empty"),
        (SSD(alpha=1.0), (forget, []), InputError, "the retain set is empty"),
        (SSD(alpha=1.0), (forget, [*retain, *forget]), InputError, "sample 16 of the retain set is also in the forget"),
        (SSD(alpha=1.0), (forget, broken), NonFiniteError, "batch 0 of the retain set"),
    ):
        with pytest.raises(error, match=message):
            method.run(model, Classification(), *sets)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), message
    SSD(alpha=1.0).run(model, Classification(), forget, [*retain, *forget], allow_duplicates=True)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(InputError, match="no trainable weights"):
        SSD().run(model, Classification(), forget, retain)


@pytest.mark.parametrize("state", STATES)
def test_the_state_of_the_process_is_not_the_runs(state: str) -> None:
    forget, retain = batches(3, 4, seed=1), batches(5, 4, seed=2)
    expected, model = make(), make()
    SSD(alpha=1.0).run(expected, Classification(), forget, retain)
    with STATES[state]():
        SSD(alpha=1.0).run(model, Classification(), forget, retain)
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), model.parameters(), strict=True))


def test_weights_without_values_are_refused() -> None:
    with pytest.raises(InputError, match=r"conv\.weight is on the meta device"):
        SSD(alpha=1.0).run(make().to("meta"), Classification(), batches(2, 4, seed=1), batches(2, 4, seed=2))
