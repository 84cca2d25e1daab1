"""Masks in a run: measured, given, checked against its data; and protection of what they leave out."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from fractions import Fraction

import pytest
import torch
from helpers.models import batches, make
from helpers.runs import Counting, identical, method, run, weights

from unlearn_ext import FisherDiagonal, InputError, ProtectionError, SaliencyMask, Unlearner, UnlearnOptimizer
from unlearn_ext.methods import Method, SFRon
from unlearn_ext.methods.values import ForgetLoss
from unlearn_ext.tasks import Classification

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


@pytest.mark.parametrize("scope", ["forget", "all"])
def test_a_ready_mask_that_keeps_no_weight(scope) -> None:
    model = make()
    empty = SaliencyMask.from_dict({n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()})
    with pytest.raises(InputError, match="the mask keeps no weight, so nothing would be forgotten: pass one that"):
        run(model, changes={"mask": empty, "mask_scope": scope})
    assert identical(weights(model), weights(make()))


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
