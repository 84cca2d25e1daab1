"""The run around the mathematics: data, resuming, history, protection, bad input."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from models import ConvNet, batches, make, samples
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from unlearn_ext import (
    FisherDiagonal,
    InputError,
    NonFiniteError,
    ProtectionError,
    SaliencyMask,
    Unlearner,
    UnlearnOptimizer,
    _checkpoint,
)
from unlearn_ext._loop import Loop
from unlearn_ext.methods import Method, SFRon
from unlearn_ext.methods.base import ForgetLoss
from unlearn_ext.methods.sfron import adaptive_shares
from unlearn_ext.tasks import Classification


def method(**changes) -> SFRon:
    settings = {"rule": "momentum", "lr": 0.02, "momentum": 0.9, "iterations": 12, "forget_freq": 2, "max_norm": 1.0}
    return SFRon(**{**settings, "lr_schedule": "cosine", **changes})


def loaders(seed: int = 3) -> dict[str, DataLoader]:
    """Shuffled loaders: one draws from the global generator, one has a generator of its own."""
    own = torch.Generator().manual_seed(seed)
    return {
        "forget": DataLoader(TensorDataset(*samples(22, 1)), batch_size=4, shuffle=True),
        "retain": DataLoader(TensorDataset(*samples(37, 2)), batch_size=4, shuffle=True, generator=own),
    }


def run(model: nn.Module, data: dict | None = None, changes: dict | None = None, **arguments):
    data = data or {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    return Unlearner(model, Classification(), method(**(changes or {}))).run(**data, **arguments)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def identical(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- The result -----------------------------------------------------------------------------------------------


def test_result_says_what_was_done() -> None:
    model = make()
    result = run(model)
    assert [entry["iteration"] for entry in result.history] == list(range(12))
    forgot, kept = result.history[2], result.history[3]
    assert set(forgot) == {"iteration", "forget_loss", "retain_loss", "lr", "alpha", "clip", "largest_share"}
    assert 0 < forgot["clip"] <= 1 and 1 / 6 <= forgot["largest_share"] <= 1 and forgot["alpha"] > 0
    assert kept["forget_loss"] is None and kept["clip"] is None and kept["retain_loss"] > 0
    assert result.history[0]["lr"] == 0.02 and result.history[-1]["lr"] < 0.001
    assert set(result.timings) == {"fisher", "mask", "unlearning"} and min(result.timings.values()) > 0
    assert result.counts["forget_steps"] == 6 and result.counts["retain_steps"] == 12
    assert result.counts["salient_weights"] == result.mask.kept
    assert result.counts["trainable_weights"] == sum(p.numel() for p in model.parameters())
    assert result.backend in ("native", "python") and result.update == "sequential" and result.moved_protected is None


def test_modes_and_gradients_are_put_back() -> None:
    model = make()
    model.train()
    model.norm.eval()  # a frozen module in a training model
    run(model)
    assert model.training and model.head.training and not model.norm.training
    assert all(p.grad is None for p in model.parameters())


def test_a_module_that_is_frozen_in_eval_mode_stays_so_while_it_runs() -> None:
    model = make().train()
    model.norm.eval()
    run(model, evaluate=lambda m, step: None, evaluate_every=1)
    assert model.norm.num_batches_tracked == 0 and torch.equal(model.norm.running_mean, torch.zeros(6))
    for wrap in (lambda m: m, nn.DataParallel):  # a new wrapper is in train mode, whatever the model is in
        model = make().eval()
        run(wrap(model))
        assert model.norm.num_batches_tracked == 12 + 6 and not model.training


def test_frozen_parameters_stay_and_tied_ones_move_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.second.weight = self.first.weight
            self.head.bias.requires_grad_(False)

        def forward(self, x):
            return self.head(torch.relu(self.second(torch.relu(self.first(x)))))

    torch.manual_seed(0)
    model = Tied()
    bias, shared = model.head.bias.clone(), model.first.weight.clone()
    data = {name: [(torch.randn(8, 4), torch.randint(0, 3, (8,)))] for name in ("forget", "retain")}
    result = run(model, data)
    assert torch.equal(model.head.bias, bias) and not torch.equal(model.first.weight, shared)
    assert model.first.weight is model.second.weight
    assert set(result.mask.names) == {"first.weight", "first.bias", "second.bias", "head.weight"}


class Outer(nn.Module):
    """A model with a part called ``module``, beside another of the same parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.weight, self.bias = nn.Linear(4, 3), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.module(x) * self.weight + self.bias


def test_names_of_wrappers_and_of_parts_called_module() -> None:
    names = ["weight", "bias", "module.weight", "module.bias"]
    compiled = nn.Sequential(torch.compile(nn.Linear(4, 4), backend="eager"), nn.Linear(4, 3))
    data = {name: [(torch.randn(8, 4), torch.randint(0, 3, (8,)))] for name in ("forget", "retain")}
    for model, expected in (
        (Outer(), names),
        (nn.DataParallel(Outer()), names),
        (torch.compile(nn.DataParallel(Outer()), backend="eager"), names),
        (compiled, ["0.weight", "0.bias", "1.weight", "1.bias"]),
    ):
        assert run(model, data).mask.names == expected
        assert list(_checkpoint.model_tensors(model)) == expected


def test_dict_batches_and_outputs_with_logits() -> None:
    class Output:
        def __init__(self, logits: torch.Tensor):
            self.logits = logits

    class Wrapped(ConvNet):
        def forward(self, x):
            return Output(super().forward(x))

    plain, wrapped = make(), make(Wrapped)
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    as_dicts = {k: [{"pixel_values": x, "labels": y} for x, y in v] for k, v in data.items()}
    run(plain, data)
    run(wrapped, as_dicts)
    assert identical(weights(plain), weights(wrapped))


@pytest.mark.parametrize("gamma", [1.0, None])
@pytest.mark.parametrize(
    ("output", "got"), [(lambda x: (x, x), "got a tuple: wrap"), (lambda x: x[:, 0], r"got shape \[6\]: wrap")]
)
def test_outputs_that_are_no_logits(output, got, gamma) -> None:
    class Wrapped(ConvNet):
        def forward(self, x):
            return output(super().forward(x))

    words = r"^the model's output: expected logits \[N, classes\] or an object with \.logits, "
    model = make(Wrapped)
    with pytest.raises(InputError, match=words + got):
        run(model, changes={"gamma": gamma})
    assert identical(weights(model), weights(make(Wrapped)))
    data = {"forget": batches(1, 6, seed=1), "retain": batches(1, 6, seed=2)}
    pairs = Classification(loss=lambda pair, labels: nn.functional.cross_entropy(pair[0], labels, reduction="none"))
    if "tuple" in got:
        Unlearner(model, pairs, method(gamma=gamma)).run(**data)


def test_a_loss_of_ones_own() -> None:
    def squared(logits, labels):
        return (logits - nn.functional.one_hot(labels, logits.shape[1])).square().sum(dim=1)

    data = {"forget": batches(2, 6, seed=1), "retain": batches(2, 6, seed=2)}
    result = Unlearner(make(), Classification(loss=squared), method()).run(**data)
    inputs, labels = data["forget"][0]
    with torch.no_grad():
        expected = squared(make().train()(inputs), labels).mean().item()
    assert result.history[0]["forget_loss"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(InputError, match="reduction"):
        Unlearner(make(), Classification(loss=nn.CrossEntropyLoss()), method()).run(**data)


def test_mixed_precision_stays_near_full_precision() -> None:
    full, half = make(), make()
    run(full)
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    Unlearner(half, Classification(), method(), mixed_precision="bf16").run(**data)
    difference = (full.head.weight - half.head.weight).abs().max()
    assert 0 < difference < 0.05 and half.head.weight.dtype == torch.float32


def test_float16_scales_its_losses() -> None:
    """An overflowing scaled gradient skips the step; the run goes on at a lower scale."""
    model = make()
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    result = Unlearner(model, Classification(), method(), mixed_precision="fp16").run(**data)
    assert len(result.history) == 12 and all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(model.head.weight, make().head.weight)


class Growing(SFRon):
    """Its forget loss becomes 8 times larger, and overflows until its scale has come down."""

    def strength(self, iteration):
        return 1.0 if iteration == 0 else 8.0


def growing() -> Growing:
    return Growing(**method(max_norm=None, lr=1e-7).settings())


def test_float16_counts_the_steps_that_it_made() -> None:
    """The forget loss has a scale of its own: that of the retain loss stays when the other comes down."""
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    result = Unlearner(make(), Classification(), growing(), mixed_precision="fp16").run(**data)
    tried = [entry for entry in result.history if entry["forget_loss"] is not None]
    skipped = [entry for entry in tried if "forget_skipped" in entry]
    assert len(tried) == 6 and 0 < len(skipped) < 6 and result.counts["forget_steps"] == 6 - len(skipped)
    assert all(entry["clip"] is None and entry["forget_skipped"] is True for entry in skipped)
    assert all(entry["clip"] == 1.0 for entry in tried if entry not in skipped)
    assert result.counts["retain_steps"] == 12 and not any("retain_skipped" in entry for entry in result.history)


def test_a_large_forget_loss_starts_at_a_small_scale() -> None:
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    strong = method(forget_alpha=1000.0, lr=1e-7)
    result = Unlearner(make(), Classification(), strong, mixed_precision="fp16").run(**data)
    assert result.counts["forget_steps"] == 6 and result.counts["retain_steps"] == 12


def test_adaptive_shares_by_hand() -> None:
    # c = 1 / (l^0.5 + 0): 1/0.5, 1/1, 1/2 -> shares 4/7, 2/7, 1/7
    shares = adaptive_shares(torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64), 0.5, 1e-300)
    assert torch.allclose(shares, torch.tensor([4, 2, 1], dtype=torch.float64) / 7)
    # A loss of exactly 0 takes everything at the released eps, and its fair part at a sane one.
    zero = torch.tensor([0.0, 1.0, 1.0])
    assert adaptive_shares(zero, 0.5, 1e-15)[0] > 0.999999
    assert adaptive_shares(zero, 0.5, 1.0)[0] == pytest.approx(0.5)
    # bfloat16 losses are weighed in float32: in their own dtype 1e-15 + 1 would be all there is.
    assert adaptive_shares(zero.bfloat16(), 0.5, 1e-3).dtype == torch.float32


# --- Data -----------------------------------------------------------------------------------------------------


def test_one_shot_iterators_are_refused() -> None:
    model = make()
    before = weights(model)
    data = {"forget": iter(batches(3, 6, seed=1)), "retain": batches(5, 6, seed=2)}
    with pytest.raises(InputError, match="one-shot iterator"):
        run(model, data)
    with pytest.raises(InputError, match="no iterable"):
        run(model, {**data, "forget": 5})
    assert identical(before, weights(model))


class Counting:
    """Counts its passes and tells whether anything holds on to them."""

    def __init__(self, data: list):
        self.data, self.passes = data, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.data)


def test_one_eval_pass_first_and_then_fresh_passes() -> None:
    modes: list[bool] = []

    class Watching(ConvNet):
        def forward(self, x):
            modes.append(self.training)
            return super().forward(x)

    forget, retain = Counting(batches(3, 6, seed=1)), Counting(batches(5, 6, seed=2))
    run(make(Watching), {"forget": forget, "retain": retain})
    # Each first pass begins with one forward pass more, which tells the number of classes.
    assert modes[:10] == [False] * 10 and all(modes[10:]) and len(modes) == 10 + 18
    assert forget.passes == 1 + 2 and retain.passes == 1 + 3  # 6 of 3, 12 of 5


@pytest.mark.parametrize("which", ["forget", "retain"])
@pytest.mark.parametrize("gamma", [1.0, None])
def test_empty_sets_are_refused(which, gamma) -> None:
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2), which: []}
    model = make()
    before = weights(model)
    with pytest.raises(InputError, match=f"the {which} set is empty"):
        run(model, data, {"gamma": gamma})
    assert identical(before, weights(model))


@pytest.mark.parametrize("gamma", [1.0, None])
def test_samples_in_both_sets_are_refused(gamma) -> None:
    forget, retain = batches(3, 6, seed=1), batches(5, 6, seed=2)
    retain[2][0][4] = forget[1][0][0]  # sample 2 * 6 + 4
    model = make()
    with pytest.raises(InputError, match=r"sample 16 of the retain set is also in the forget set.*allow.duplicates"):
        run(model, {"forget": forget, "retain": retain}, {"gamma": gamma})
    assert identical(weights(model), weights(make()))
    assert run(model, {"forget": forget, "retain": retain}, allow_duplicates=True).counts["iterations"] == 12


def test_the_whole_set_cannot_be_forgotten() -> None:
    everything = batches(3, 6, seed=1)
    with pytest.raises(InputError, match="also in the forget set"):
        run(make(), {"forget": everything, "retain": everything})


@pytest.mark.parametrize("label", [4, -1])
def test_labels_out_of_range(label) -> None:
    for batch in (0, 2):  # seen first by the model, or first by the loader
        retain = batches(5, 6, seed=2)
        retain[batch][1][3] = label
        with pytest.raises(InputError, match=rf"label {label} is outside the model's 4 classes"):
            run(make(), {"forget": batches(3, 6, seed=1), "retain": retain})


def test_labels_that_only_a_loss_of_ones_own_understands() -> None:
    """Such as ignore_index=-100: what they mean is the loss's affair."""
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    data["retain"][2][1][3] = -100
    loss = nn.CrossEntropyLoss(reduction="none")
    assert Unlearner(make(), Classification(loss=loss), method()).run(**data).counts["iterations"] == 12


def test_the_first_pass_over_the_data_only_checks_it() -> None:
    class Counting(Classification):
        prepared = 0

        def prepare(self, batch, device):
            self.prepared += 1
            return super().prepare(batch, device)

    task = Counting()
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    Unlearner(make(), task, method(gamma=None, iterations=2)).run(**data)
    assert task.prepared == 2 + 3  # to learn the classes, once a set; one forget and two retain batches


def test_batches_of_the_wrong_form() -> None:
    good = batches(3, 6, seed=1)
    for bad, words in (
        ([torch.zeros(6, 2, 5, 5)], "a batch is"),
        ([{"images": torch.zeros(1)}], "pixel_values and labels, all tensors; got a dict of images"),
        ([(torch.zeros(6, 2, 5, 5), torch.zeros(5, dtype=torch.int64))], "6 inputs and 5 labels"),
        ([(torch.zeros(6, 2, 5, 5), torch.zeros(6))], "expected integers of shape"),
    ):
        with pytest.raises(InputError, match=words):
            run(make(), {"forget": bad, "retain": good})


# --- Not finite -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["forget", "retain"])
def test_a_loss_that_is_not_finite_stops_before_its_step(side, monkeypatch) -> None:
    model = make()
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    states: list[dict] = []
    forgot: list[dict] = []
    step = UnlearnOptimizer.forget_step

    def recorded(optimizer, *arguments):
        step(optimizer, *arguments)
        forgot.append(weights(model))

    monkeypatch.setattr(UnlearnOptimizer, "forget_step", recorded)

    def poison(m, step):
        states.append(weights(m))
        if step == 2:
            data[side][0 if side == "forget" else 2][0][0] = float("nan")
            data[side][1][0][0] = float("nan")

    with pytest.raises(NonFiniteError, match=rf"iteration 2: the {side} loss is nan"):
        run(model, data, evaluate=poison, evaluate_every=1)
    after = weights(model)
    # Buffers too: the poisoned batch went through BatchNorm.
    assert identical(after, states[-1] if side == "forget" else forgot[-1])


def test_a_gradient_that_is_not_finite_names_its_parameter() -> None:
    class Root(torch.autograd.Function):
        """A finite loss with an infinite gradient, as sqrt has at 0."""

        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        def backward(ctx, g):
            return g * float("inf")

    class Steep(ConvNet):
        steep = False

        def forward(self, x):
            y = super().forward(x)
            return Root.apply(y) if self.steep and self.training else y

    model = make(Steep)

    def switch(m, step):
        m.steep = step == 3

    with pytest.raises(NonFiniteError, match=r"iteration 3: retain_step: the retain gradient of \w+.* is not finite"):
        run(model, evaluate=switch, evaluate_every=1)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_buffers_that_are_written_are_put_back_and_tables_copied_once(monkeypatch) -> None:
    class WithTable(ConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(1000))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            if self.training:
                self.seen += 1
            return super().forward(x)

    model, copied = make(WithTable), []
    remember = Loop._remember_buffers

    def recorded(loop):
        remember(loop)
        copied.append({tuple(before.shape) for _, before in loop.before})

    monkeypatch.setattr(Loop, "_remember_buffers", recorded)
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}

    def poison(m, step):
        if step == 3:
            data["retain"][3][0][0] = float("nan")

    with pytest.raises(NonFiniteError, match="iteration 3"):
        run(model, data, evaluate=poison, evaluate_every=1)
    assert (1000,) in copied[0] and not any((1000,) in shapes for shapes in copied[1:])
    assert model.seen == model.norm.num_batches_tracked == 3 + 2 and model.norm.running_mean.isfinite().all()


def test_gradients_found_late_name_their_iterations_and_are_not_saved(monkeypatch, tmp_path) -> None:
    """As on a device, where the host reads the flag at log points and checkpoints only."""

    def late(optimizer):
        if optimizer.param_groups[0]["retain_steps"] > 5:
            raise NonFiniteError("a gradient was not finite")

    monkeypatch.setattr(UnlearnOptimizer, "raise_if_non_finite", late)
    with pytest.raises(NonFiniteError, match=r"^iterations 4 to 5: a gradient was not finite$"):
        run(make(), log_every=4, output_dir=tmp_path, checkpointing_steps=6)
    assert not list(tmp_path.glob("checkpoint-*"))
    with pytest.raises(NonFiniteError, match=r"^iteration 5: a gradient"):
        run(make())


def test_a_non_finite_fisher_pass_changes_nothing() -> None:
    model = make()
    forget = batches(3, 6, seed=1)
    forget[2][0][0] = float("inf")
    with pytest.raises(NonFiniteError, match="batch 2 of the forget set"):
        run(model, {"forget": forget, "retain": batches(5, 6, seed=2)})
    assert identical(weights(model), weights(make()))


def test_models_without_trainable_weights_or_gradients() -> None:
    with pytest.raises(InputError, match="no trainable weights"):
        Unlearner(make().requires_grad_(False), Classification(), method())

    class Detached(ConvNet):
        def forward(self, x):
            return super().forward(x).detach().requires_grad_()

    with pytest.raises(InputError, match="no trainable weight received a gradient"):
        run(make(Detached))
    with pytest.raises(InputError, match="every gradient is None"):
        run(make(Detached), changes={"gamma": None})


# --- Masks and protection -------------------------------------------------------------------------------------


def test_a_fraction_of_the_weights() -> None:
    model = make()
    result = run(model, changes={"mask_fraction": 0.29})
    total = result.counts["trainable_weights"]
    assert result.mask.kept == result.counts["salient_weights"] == int(Fraction(29, 100) * total)
    assert result.mask.metadata["mask_fraction"] == "0.29" and "gamma" not in result.mask.metadata
    assert {"weights_hash", "forget_hash", "seed"} <= result.mask.metadata.keys()
    # The same mask, measured before.
    again = make()
    assert run(again, changes={"mask": result.mask}).timings.keys() == {"unlearning"}
    assert identical(weights(model), weights(again))


def test_a_fraction_survives_a_checkpoint(tmp_path) -> None:
    changes = {"mask_fraction": 0.5}
    whole = make()
    run(whole, changes=changes)
    run(make(), changes=changes, output_dir=tmp_path, checkpointing_steps=5)
    shutil.rmtree(tmp_path / "checkpoint-10")
    resumed = make(seed=9)
    run(resumed, changes=changes, output_dir=tmp_path, resume_from_checkpoint="latest")
    assert identical(weights(whole), weights(resumed))
    for other in ({"mask_fraction": 0.25}, {"gamma": 1.0}, {}):
        with pytest.raises(InputError, match="was written with"):
            run(make(), changes=other, output_dir=tmp_path, resume_from_checkpoint="latest")


def test_a_method_takes_one_source_of_its_mask() -> None:
    ready = SaliencyMask.from_dict({"w": torch.tensor(True)})
    for given, message in (
        ({"gamma": 1.0, "mask_fraction": 0.5}, "^gamma and mask_fraction each say"),
        ({"gamma": 0.0, "mask": ready}, "^gamma and mask each say"),
        ({"mask_fraction": 0.0, "mask": ready}, "^mask_fraction and mask each say"),
        ({"gamma": 1.0, "mask_fraction": 0.5, "mask": ready}, "^gamma and mask_fraction and mask each say"),
    ):
        with pytest.raises(InputError, match=message + ".*give only one"):
            method(**given)
    for fraction in (-0.1, 1.1, float("nan"), "half"):
        with pytest.raises(InputError, match="mask_fraction: expected a number from 0 to 1"):
            method(mask_fraction=fraction)


def test_a_given_mask_replaces_the_default_gamma() -> None:
    ready = SaliencyMask.from_dict({"w": torch.tensor(True)})
    for build in (SFRon, lambda **given: SFRon.preset("cifar10-resnet18", **given)):
        for given, gamma, fraction, measured in (
            ({}, 1.0, None, True),
            ({"gamma": 3}, 3, None, True),
            ({"gamma": None}, None, None, False),
            ({"mask": None, "mask_fraction": None}, 1.0, None, True),
            ({"mask_fraction": 0.5}, None, 0.5, True),
            ({"gamma": None, "mask_fraction": 0.5}, None, 0.5, True),
            ({"mask": ready}, None, None, False),
        ):
            own = build(**given)
            assert (own.gamma, own.mask_fraction, own.needs_fisher) == (gamma, fraction, measured)
            assert {type(value) for value in own.settings().values()} <= {str, int, float, bool, tuple, type(None)}
            assert json.loads(json.dumps(own.settings()))["gamma"] == gamma
            assert "mask" not in own.settings()
    assert dataclasses.replace(SFRon(), mask=ready).mask is ready
    assert dataclasses.replace(SFRon(), mask_fraction=0.5).gamma is None


def test_a_method_that_measures_nothing_takes_no_fraction() -> None:
    class Ascent(Method):
        name = "ascent"

        def strength(self, iteration):
            return 1.0

        def forget_loss(self, losses, iteration):
            return ForgetLoss(-losses.mean())

    assert Ascent(rule="sgd", lr=0.1).mask_fraction is None
    with pytest.raises(InputError, match="mask_fraction: Ascent measures no saliency; give it a ready mask"):
        Ascent(rule="sgd", lr=0.1, mask_fraction=0.5)


def test_a_ready_mask_is_used_and_checked() -> None:
    made = run(make()).mask
    again, model = make(), make()
    result = run(model, changes={"mask": made})
    run(again)
    assert identical(weights(model), weights(again)) and "fisher" not in result.timings
    with pytest.raises(InputError, match="other weights"):
        run(make(seed=5), changes={"mask": made})
    with pytest.warns(UserWarning, match="another forget set"):
        run(make(), {"forget": batches(3, 6, seed=9), "retain": batches(5, 6, seed=2)}, {"mask": made})
    wrong = SaliencyMask.from_dict({**made.unpack(), "head.bias": torch.ones(5, dtype=torch.bool)})
    with pytest.raises(InputError, match=r"head\.bias has shape \[5\]"):
        run(make(), changes={"mask": wrong})


def test_a_ready_mask_is_checked_before_a_pass_over_the_data() -> None:
    model, forget = make(), Counting(batches(3, 6, seed=1))
    wrong = SaliencyMask.from_dict({name: torch.ones(3, dtype=torch.bool) for name, _ in model.named_parameters()})
    with pytest.raises(InputError, match="use the mask made for this model"):
        run(model, {"forget": forget, "retain": batches(5, 6, seed=2)}, {"mask": wrong})
    assert forget.passes == 0


class Augmenting(Counting):
    """Another view of every sample on every pass."""

    def __iter__(self):
        return ((x + 0.01 * self.passes, y) for x, y in super().__iter__())


def test_a_mask_may_be_used_on_other_views_of_its_data() -> None:
    data = {"forget": Augmenting(batches(3, 6, seed=1)), "retain": Augmenting(batches(5, 6, seed=2))}
    made = run(make(), data).mask
    with pytest.warns(UserWarning, match="other views of its samples"):
        assert run(make(), data, {"mask": made}).counts["iterations"] == 12


@pytest.mark.parametrize("allow", [False, True])
def test_each_set_may_have_its_own_number_of_fisher_batches(allow: bool) -> None:
    seen: dict[str, list[tuple[int, int | None]]] = {}
    mask = run(
        make(),
        changes={"fisher_batches": (1, 4)},
        allow_duplicates=allow,
        progress=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)),
    ).mask
    lengths = (1, 4) if allow else (3, 5)  # else all are looked at, for duplicates
    assert seen["Fisher, forget set"][-1] == (lengths[0],) * 2
    assert seen["Fisher, retain set"][-1] == (lengths[1],) * 2
    forget, retain = (FisherDiagonal(make(), Classification(), batches=count) for count in (1, 4))
    expected = SaliencyMask.from_fisher(
        forget.measure(batches(3, 6, seed=1)), retain.measure(batches(5, 6, seed=2)), gamma=method().gamma
    )
    assert mask == expected


def test_a_pair_of_fisher_batches_survives_json() -> None:
    pair = method(fisher_batches=(1, 4))
    assert method(**json.loads(json.dumps(pair.settings()))).fisher_batches == pair.fisher_batches == (1, 4)
    with pytest.raises(InputError, match="fisher_batches: expected"):
        method(fisher_batches=(None, 4))
    assert pair.fisher_limits == (1, 4) and method(fisher_batches=3).fisher_limits == (3, 3)


def test_a_mask_of_part_of_the_data_names_no_forget_set() -> None:
    whole, part = (run(make(), changes={"fisher_batches": 2}, allow_duplicates=allow).mask for allow in (False, True))
    assert "forget_hash" in whole.metadata and "forget_hash" not in part.metadata
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(make(), changes={"mask": part})


# --- Groups ---------------------------------------------------------------------------------------------------


def test_a_group_of_weights_takes_forget_steps_of_its_own_length() -> None:
    same = {
        "rule": "sgd",
        "momentum": 0.0,
        "lr": 0.0,
        "forget_lr": 0.01,
        "iterations": 1,
        "max_norm": None,
        "gamma": None,
    }
    start, moved = weights(make()), []
    for groups in (None, {"head.weight": {"forget_lr": 0.05}, "head*": {"forget_lr": 0.02}}):
        model = make()
        run(model, changes={**same, "param_groups": groups})
        moved.append({name: p.detach() - start[name] for name, p in model.named_parameters()})
    for name, plain in moved[0].items():
        factor = {"head.weight": 5.0, "head.bias": 2.0}.get(name, 1.0)
        assert plain.abs().max() > 0 or name == "conv.bias"  # which normalisation takes away again
        torch.testing.assert_close(moved[1][name], factor * plain, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"update": "joint"}, {"mask_scope": "all", "protect": True}], ids=str)
def test_groups_of_the_same_settings_change_nothing(changes) -> None:
    plain, grouped = make().double(), make().double()
    data = {"forget": batches(3, 6, seed=1, dtype=torch.float64), "retain": batches(5, 6, seed=2, dtype=torch.float64)}
    expected = run(plain, data, changes)
    # The first weights of the model go last: masks, gradients and hashes must follow.
    result = run(grouped, data, {**changes, "param_groups": {"conv*": {"lr": 0.02}}})
    for name, value in weights(plain).items():
        torch.testing.assert_close(grouped.state_dict()[name], value, rtol=0, atol=1e-12)
    assert result.mask == expected.mask and result.moved_protected == expected.moved_protected


def test_the_order_of_groups_is_that_of_the_state(tmp_path) -> None:
    groups = {"conv.bias": {"lr": 0.01}, "norm.bias": {"lr": 0.03}}  # of one shape
    run(make(), changes={"param_groups": groups}, output_dir=tmp_path, checkpointing_steps=7)
    resume = {"output_dir": tmp_path, "resume_from_checkpoint": "latest"}
    with pytest.raises(InputError, match="was written with param_groups="):
        run(make(), changes={"param_groups": dict(reversed(groups.items()))}, **resume)
    run(make(), changes={"param_groups": groups}, **resume)


def test_groups_that_cannot_be() -> None:
    seen: list[str] = []

    def run(model, changes):
        unlearner = Unlearner(model, Classification(), method(**changes))
        unlearner.run(batches(3, 6, seed=1), batches(5, 6, seed=2), progress=lambda stage, *_: seen.append(stage))

    with pytest.raises(InputError, match=r"param_groups: embed\* fits no trained weight"):
        run(make(), changes={"param_groups": {"embed*": {"lr": 0.1}}})
    with pytest.raises(InputError, match=r"fits no trained weight that an earlier pattern left"):
        run(make(), changes={"param_groups": {"*": {"lr": 0.1}, "conv*": {"lr": 0.2}}})
    with pytest.raises(InputError, match="rule is no setting of a parameter group"):
        run(make(), changes={"param_groups": {"conv*": {"rule": "adam"}}})
    with pytest.raises(InputError, match="expected name patterns with a dict of settings each"):
        method(param_groups={"conv*": 0.1})
    with pytest.raises(InputError, match=r"forget_lr does not apply to update='joint'"):
        method(update="joint", param_groups={"conv*": {"forget_lr": 0.1}})
    for settings in ({"params": [1]}, {"lr": -1.0}, {"initial_lr": 0.1}):
        with pytest.raises(InputError):
            method(param_groups={"conv*": settings})
    with pytest.raises(InputError, match="expected name patterns"):
        method(param_groups={1: {}})
    method(update="joint", param_groups={"conv*": {"forget_lr": None}})
    assert not seen, "refused before anything was measured"


# --- Protection -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_protection_of_the_whole_run_is_proven(rule) -> None:
    model = make()
    before = weights(model)
    changes = {"mask_scope": "all", "protect": True, "weight_decay": 0.1, "rule": rule, "slow_rate": 0.5}
    result = run(model, changes=changes)
    protected = 0
    for name, keep in result.mask.unpack().items():
        assert torch.equal(model.state_dict()[name][~keep], before[name][~keep])
        protected += int((~keep).sum())
    assert result.moved_protected == 0 and protected > 0
    assert result.protection.startswith(f"0 of {protected} protected weights moved")


def test_broken_protection_fails_the_run() -> None:
    model = make()

    def meddle(m, step):
        with torch.no_grad():
            m.conv.weight += 1e-7 * m.conv.weight.sign()
            m.conv.weight += 1.0

    with pytest.raises(ProtectionError, match=r"protected weights of conv\.weight have changed"):
        run(model, changes={"mask_scope": "all", "protect": True}, evaluate=meddle, evaluate_every=5)


def test_protection_within_forget_steps_is_called_so() -> None:
    result = run(make(), changes={"protect": True})
    assert result.moved_protected is None and "within forget steps only" in result.protection


# --- Evaluating, stopping, logging ------------------------------------------------------------------------------


def test_evaluating_does_not_disturb_the_run_and_may_stop_it() -> None:
    plain, watched = make(dropout=0.5), make(dropout=0.5)

    def draw(model, step):
        assert not model.training
        return {"noise": float(torch.rand(()))}

    torch.manual_seed(1)
    run(plain, loaders())
    torch.manual_seed(1)
    result = run(watched, loaders(), evaluate=draw, evaluate_every=3, log_every=5)
    assert identical(weights(plain), weights(watched))
    assert [e["iteration"] for e in result.history] == [2, 4, 5, 8, 9, 11] and "evaluation" in result.history[0]
    result = run(make(), evaluate=lambda model, step: step >= 4, evaluate_every=2)
    assert result.stopped_at == 4 and len(result.history) == 4


def test_gradients_of_an_evaluation_do_not_leak_into_the_run() -> None:
    class Freezing(ConvNet):
        """Its convolution takes no part in training, and would be moved by whatever gradient lies there."""

        def forward(self, x):
            x = torch.relu(self.norm(self.conv(x)))
            return self.head((x.detach() if self.training else x).mean(dim=(2, 3)))

    def differentiate(model, step):
        with torch.enable_grad():
            model(batches(1, 6, seed=3)[0][0]).sum().backward()

    plain, watched = make(Freezing), make(Freezing)
    run(plain, changes={"gamma": None})
    run(watched, changes={"gamma": None}, evaluate=differentiate, evaluate_every=1)
    assert identical(weights(plain), weights(watched))


def test_the_history_is_json_whatever_an_evaluation_returns(tmp_path) -> None:
    returned = {"loss": float("nan"), "list": [float("inf"), 1.0], "tensor": torch.tensor([-math.inf, 2.0])}
    changes = {"iterations": 1}
    result = run(make(), changes=changes, evaluate=lambda *_: returned, evaluate_every=1, output_dir=tmp_path)
    expected = {"loss": None, "list": [None, 1.0], "tensor": [None, 2.0]}
    line = (tmp_path / "history.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["evaluation"] == expected
    assert result.history[0]["evaluation"] == expected


def test_bad_arguments_of_run(tmp_path) -> None:
    for arguments, words in (
        ({"checkpointing_steps": 2}, "needs an output_dir"),
        ({"log_every": 0}, "log_every"),
        ({"evaluate_every": 1.5, "evaluate": print}, "evaluate_every: expected an integer from 1, got 1.5"),
        ({"resume_from_checkpoint": "latest"}, "needs the output_dir"),
        ({"resume_from_checkpoint": "latest", "output_dir": tmp_path}, "no checkpoint in"),
        ({"resume_from_checkpoint": tmp_path / "none"}, "no checkpoint at"),
    ):
        with pytest.raises(InputError, match=words):
            run(make(), **arguments)
    with pytest.raises(InputError, match="mixed_precision"):
        Unlearner(make(), Classification(), method(), mixed_precision="half")


def test_bad_settings_of_the_method() -> None:
    for changes, words in (
        ({"iterations": 0}, "iterations"),
        ({"update": "both"}, "sequential or joint"),
        ({"lr_schedule": "step"}, "lr_schedule"),
        ({"forget_schedule": "exp"}, "forget_schedule"),
        ({"lambd": -1.0}, "lambd"),
        ({"update": "joint", "dual_state": True}, "dual_state"),
        ({"lr": -1.0}, "lr: expected a finite number from 0, got -1.0"),
        ({"lr": "a"}, "lr: expected a finite number from 0, got 'a'"),
        ({"iterations": 2.5}, "iterations: expected an integer from 1, got 2.5"),
        ({"forget_freq": 1.5}, "forget_freq: expected an integer from 1, got 1.5"),
        ({"slow_freq": 1.5}, "slow_freq: expected an integer from 1, got 1.5"),
        ({"fisher_batches": 0}, "fisher_batches: expected an integer from 1, got 0"),
        ({"fisher_batches": (2, 0)}, "fisher_batches: expected an integer from 1, got 0"),
        ({"fisher_batches": [2, 3, 4]}, r"fisher_batches: expected a number or a pair.*got \[2, 3, 4\]"),
        ({"forget_alpha": "a"}, "forget_alpha: expected a number or 'auto', got 'a'"),
        ({"fisher_eps": 0.0}, "fisher_eps: expected a finite number above 0, got 0.0"),
        ({"momentum": 1.5}, r"momentum: expected a number in \[0, 1\), got 1.5"),
        ({"rule": "sgd"}, "momentum=0.9 does nothing"),
        ({"protect": True, "gamma": None}, "protect=True needs a mask"),
    ):
        with pytest.raises(InputError, match=words):
            method(**changes)
    with pytest.raises(InputError, match=r"no preset 'cifar'.*cifar10-resnet18, tinyimagenet-swin"):
        SFRon.preset("cifar")
    assert SFRon.preset("cifar10-resnet18", iterations=7).iterations == 7


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_is_read_only(tmp_path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot write"):
        run(make(), output_dir=tmp_path / "out")


def test_a_directory_that_cannot_be(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    model = make()
    with pytest.raises(InputError, match="cannot write"):
        run(model, output_dir=tmp_path / "file" / "out")
    assert identical(weights(model), weights(make()))


# --- Resuming -------------------------------------------------------------------------------------------------

RESUMABLE = {
    "momentum": {"rule": "momentum"},
    "adamw, slow": {"rule": "adamw", "lr": 1e-3, "slow_rate": 0.5, "slow_freq": 5},
    "dual": {"rule": "momentum", "dual_state": True, "forget_rule": "adam", "forget_lr": 1e-3},
    "joint, protected": {"update": "joint", "mask_scope": "all", "protect": True},
    "groups, protected": {
        "mask_scope": "all",
        "protect": True,
        "param_groups": {"conv.bias": {"lr": 0.01}, "norm.bias": {"lr": 0.03}},
    },
}


@pytest.mark.parametrize("log_every", [1, 4])
@pytest.mark.parametrize("changes", RESUMABLE.values(), ids=RESUMABLE.keys())
def test_a_resumed_run_is_the_uninterrupted_one(changes, log_every, tmp_path) -> None:
    whole, interrupted = make(dropout=0.3), make(dropout=0.3)
    torch.manual_seed(7)
    expected = run(whole, loaders(), changes, log_every=log_every)
    torch.manual_seed(7)
    run(
        interrupted,
        loaders(),
        changes,
        output_dir=tmp_path,
        checkpointing_steps=7,
        evaluate=lambda model, step: step == 9,
        evaluate_every=1,
        log_every=log_every,
    )
    torch.manual_seed(99)  # whatever the new process has drawn before
    resumed = make(seed=4, dropout=0.3)
    resume = {"output_dir": tmp_path, "resume_from_checkpoint": "latest", "log_every": log_every}
    result = run(resumed, loaders(seed=50), changes, **resume)
    assert identical(weights(whole), weights(resumed))
    assert result.history == expected.history
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == expected.history
    assert result.counts == expected.counts and result.mask == expected.mask
    assert result.moved_protected == expected.moved_protected


def test_a_checkpoint_of_other_settings_or_another_model_is_refused(tmp_path) -> None:
    run(make(), output_dir=tmp_path, checkpointing_steps=6)
    with pytest.raises(InputError, match=r"written with lr=0\.02 and the method has 0\.5"):
        run(make(), changes={"lr": 0.5}, output_dir=tmp_path, resume_from_checkpoint="latest")
    other = make(classes=5)
    before = weights(other)
    with pytest.raises(InputError, match="shape"):
        run(other, output_dir=tmp_path, resume_from_checkpoint="latest")
    assert identical(before, weights(other))


def test_a_resumed_run_in_float16_is_the_uninterrupted_one(tmp_path) -> None:
    """Both scales go on where they were."""
    data = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    results, models = [], (make(), make())
    for model, resume in ((models[0], {}), (models[1], {"resume_from_checkpoint": tmp_path / "checkpoint-5"})):
        unlearner = Unlearner(model, Classification(), growing(), mixed_precision="fp16")
        results.append(unlearner.run(**data, output_dir=tmp_path, checkpointing_steps=5, **resume))
    assert results[0].counts == results[1].counts and results[0].history == results[1].history
    assert identical(*map(weights, models))


def test_a_run_that_was_stopped_stays_stopped(tmp_path) -> None:
    stopping = {"evaluate": lambda model, step: step >= 8, "evaluate_every": 4, "checkpointing_steps": 4}
    model = make()
    result = run(model, output_dir=tmp_path, **stopping)
    history = (tmp_path / "history.jsonl").read_text()
    for arguments in (stopping, {}):
        resumed = make(seed=4)
        again = run(resumed, output_dir=tmp_path, resume_from_checkpoint="latest", **arguments)
        assert again.stopped_at == result.stopped_at == 8
        assert identical(weights(model), weights(resumed)) and again.mask == result.mask
        assert again.history == result.history and again.counts == result.counts and again.timings == result.timings
        assert (tmp_path / "history.jsonl").read_text() == history
        assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-8", "history.jsonl"]
    earlier = {"resume_from_checkpoint": tmp_path / "checkpoint-4"}
    assert run(make(), **earlier, **{**stopping, "output_dir": tmp_path}).stopped_at == 8
    assert run(make(), **earlier).stopped_at is None


def test_the_history_of_an_earlier_run_is_moved_aside(tmp_path) -> None:
    kept = []
    for iterations in (3, 5, 2):
        run(make(), changes={"iterations": iterations}, output_dir=tmp_path)
        kept.append((tmp_path / "history.jsonl").read_text())
        assert kept[-1].count("\n") == iterations
    names = ("history-1.jsonl", "history-2.jsonl", "history.jsonl")
    assert [(tmp_path / name).read_text() for name in names] == kept and len(list(tmp_path.iterdir())) == 3


def interrupted(directory: Path, changes: dict | None = None, **arguments) -> Path:
    """A directory with checkpoints and a history."""
    run(make(), changes=changes, output_dir=directory, checkpointing_steps=6, **arguments)
    return directory / "checkpoint-12"


def refused(message: str, model: nn.Module, directory: Path, data: dict | None = None, **arguments) -> None:
    """Resuming fails in one sentence and changes neither model nor files."""
    before, history = weights(model), (directory / "history.jsonl").read_text()
    data = data or {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}
    with pytest.raises(InputError, match=message) as caught:
        Unlearner(model, Classification(), **arguments).run(
            **data, output_dir=directory, resume_from_checkpoint="latest"
        )
    assert "\n" not in str(caught.value)
    assert identical(before, weights(model)) and (directory / "history.jsonl").read_text() == history


def test_resuming_needs_the_same_run(tmp_path) -> None:
    interrupted(tmp_path, {"gamma": None})
    own = method(gamma=None)
    frozen = make(seed=4)
    frozen.conv.requires_grad_(False)
    refused(r"of a run in which conv\.\w+ was trained: set requires_grad", frozen, tmp_path, method=own)
    words = "written with mixed_precision='no' and the method has 'bf16'"
    refused(words, make(seed=4), tmp_path, method=own, mixed_precision="bf16")
    refused("dtype", make(seed=4).double(), tmp_path, method=own)
    mask = SaliencyMask.from_dict({n: torch.ones(p.shape, dtype=torch.bool) for n, p in make().named_parameters()})
    refused("written with another mask", make(seed=4), tmp_path, method=method(gamma=None, mask=mask))
    shorter = {"forget": batches(2, 6, seed=1), "retain": batches(5, 6, seed=2)}
    refused("the forget set had 3 batches .* and has 2 now: pass the same data", make(), tmp_path, shorter, method=own)
    refused("the forget set had 3 batches", make(), tmp_path, loaders(), method=own)
    data = {"forget": batches(3, 6, seed=1), "retain": Generated(batches(5, 6, seed=2))}
    refused("had 0 generators .* and has 1 now: pass the same loaders", make(), tmp_path, data, method=own)


class Generated(list):
    """Batches with a generator, as a DataLoader has one."""

    generator = torch.Generator()


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run(make(), output_dir=tmp_path, checkpointing_steps=2, checkpoints_total_limit=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-12"]
    with pytest.raises(InputError, match="checkpoints_total_limit"):
        run(make(), output_dir=tmp_path, checkpointing_steps=2, checkpoints_total_limit=0)


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("state.json", b'{"format": ', "its state.json cannot be read"),
        ("state.json", b"[]", "its state.json cannot be read"),
        ("state.json", b'{"format": "unlearn_ext.checkpoint.6", "iteration": 12}', "its state.json lacks param_groups"),
        ("model.safetensors", b"junk", "its model.safetensors cannot be read"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("optimizer.safetensors", b"", "its optimizer.safetensors cannot be read"),
        ("mask.safetensors", b"junk", "not a safetensors file"),
        ("mask.safetensors", None, "there is no mask"),
    ],
)
def test_a_damaged_checkpoint_is_refused_before_anything_is_changed(file, content, words, tmp_path) -> None:
    checkpoint = interrupted(tmp_path)
    (checkpoint / file).unlink()
    if content is not None:
        (checkpoint / file).write_bytes(content)
    message = f"checkpoint-12 is damaged: .*{words}.*; resume from an earlier one"
    refused(message, make(seed=4), tmp_path, method=method())


def test_labels_are_checked_after_resuming_as_well(tmp_path) -> None:
    interrupted(tmp_path, {"iterations": 30}, evaluate=lambda model, step: step == 13, evaluate_every=1)
    retain = batches(5, 6, seed=2)
    retain[4][1][3] = 4
    with pytest.raises(InputError, match="label 4 is outside the model's 4 classes"):
        run(
            make(),
            {"forget": batches(3, 6, seed=1), "retain": retain},
            {"iterations": 30},
            output_dir=tmp_path,
            resume_from_checkpoint="latest",
        )


def test_what_killed_processes_left_is_swept_at_the_next_checkpoint(tmp_path) -> None:
    for name in (".checkpoint-6-old-abc", ".checkpoint-12-def"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"part")
    interrupted(tmp_path)
    names = ["checkpoint-12", "checkpoint-6", "history.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


KILLED = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_unlearner import loaders, make, method, Classification, Unlearner
torch.manual_seed(7)
changes = dict(iterations=4000)
Unlearner(make(dropout=0.3), Classification(), method(**changes)).run(
    **loaders(), output_dir={output!r}, checkpointing_steps=5)
"""


def test_kill_and_resume(tmp_path) -> None:
    """A killed process leaves whole checkpoints only, and the run continues from the newest."""
    script = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent), output=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint-15").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    stderr = process.communicate()[1].decode()
    assert (tmp_path / "checkpoint-15").exists(), stderr
    latest = max(int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-*"))
    stop = latest + 12

    torch.manual_seed(7)
    whole = make(dropout=0.3)
    run(whole, loaders(), {"iterations": 4000}, evaluate=lambda m, step: step == stop, evaluate_every=1)
    resumed = make(seed=9, dropout=0.3)
    result = run(
        resumed,
        loaders(),
        {"iterations": 4000},
        output_dir=tmp_path,
        resume_from_checkpoint="latest",
        evaluate=lambda m, step: step == stop,
        evaluate_every=1,
    )
    assert identical(weights(whole), weights(resumed))
    assert [entry["iteration"] for entry in result.history] == list(range(stop))


def test_fixed_api() -> None:
    """The call that others build on, word for word."""
    model = copy.deepcopy(make())
    forget_batches, retain_batches = batches(3, 6, seed=1), batches(5, 6, seed=2)
    method = SFRon(rule="momentum", lr=0.01, momentum=0.9, weight_decay=5e-4, lr_schedule="cosine",
                   iterations=5, forget_freq=5, forget_alpha=25.0, forget_schedule="cosine",
                   lambd=0.5, gamma=1.0, max_norm=7.0, slow_rate=1.0, slow_freq=1, dual_state=False,
                   retain_max_norm=None, fisher_batches=None, mask=None, adaptive_eps=1e-15, fisher_eps=1e-15,
                   update="sequential")  # fmt: skip
    result = Unlearner(model, task=Classification(), method=method).run(forget=forget_batches, retain=retain_batches)
    assert len(result.history) == 5


def test_a_mask_measured_beside_frozen_weights_fits_all_parameters() -> None:
    model = make()
    model.conv.bias.requires_grad_(False)
    result = Unlearner(model, Classification(), SFRon(rule="adamw", lr=1e-3, iterations=1)).run(
        batches(3, 6, seed=1), batches(5, 6, seed=2)
    )
    optimizer = UnlearnOptimizer(model.named_parameters(), rule="adamw", lr=1e-3, mask=result.mask)
    model(batches(1, 6, seed=3)[0][0]).sum().backward()
    frozen = model.conv.bias.clone()
    optimizer.forget_step()
    assert torch.equal(model.conv.bias, frozen)
    model.conv.bias.requires_grad_(True)
    with pytest.raises(InputError, match=r"has no bits for conv\.bias"):
        UnlearnOptimizer(model.named_parameters(), rule="adamw", lr=1e-3, mask=result.mask)


def test_metadata_of_a_mask_is_kept_as_text(tmp_path) -> None:
    SaliencyMask.from_dict({"w": torch.ones(3, dtype=torch.bool)}, {"seed": 3}).save(tmp_path / "mask.safetensors")
    assert SaliencyMask.load(tmp_path / "mask.safetensors").metadata["seed"] == "3"
