"""A run of the unlearner: what it says, gives back and puts back, groups of weights, evaluating, bad arguments."""

from __future__ import annotations

import copy
import json
import math
import os

import pytest
import torch
from helpers.models import ConvNet, batches, make
from helpers.runs import growing, identical, loaders, method, run, weights
from torch import nn

from unlearn_ext import InputError, Unlearner
from unlearn_ext.methods import SFRon
from unlearn_ext.methods.sfron import adaptive_shares
from unlearn_ext.run import checkpoint
from unlearn_ext.tasks import Classification

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
        assert list(checkpoint.model_tensors(model)) == expected


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
