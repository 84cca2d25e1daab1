"""What the methods ask of a run: sets, teachers, unseen data, passes, checkpoints; and what is refused."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from helpers.method_runs import loaders, run, same, sets, short
from helpers.models import batches, make
from torch import nn

from unlearn_ext import InputError, NonFiniteError, SaliencyMask, Unlearner
from unlearn_ext.methods import (
    METHODS,
    BadTeacher,
    Finetune,
    GradientAscent,
    NablaTau,
    RandomLabel,
    SalUn,
    Scrub,
    SFRon,
    find,
    parse,
)
from unlearn_ext.saliency.gradient import GradientSum
from unlearn_ext.tasks import Classification

ON_CLASSIFIERS = [name for name, method in METHODS.items() if "classification" in method.row.tasks]
# --- Any method -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_CLASSIFIERS)
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path) -> None:
    whole, interrupted = make(dropout=0.3), make(dropout=0.3)
    torch.manual_seed(7)
    expected = run(whole, name, loaders(name))
    torch.manual_seed(7)
    stopping = {"evaluate": lambda model, step: step == 9, "evaluate_every": 1}
    run(interrupted, name, loaders(name), output_dir=tmp_path, checkpointing_steps=7, **stopping)
    torch.manual_seed(99)
    resumed = make(seed=4, dropout=0.3)  # of other weights, which may be no one's teacher
    result = run(resumed, name, loaders(name, seed=50), output_dir=tmp_path, resume_from_checkpoint="latest")
    assert same(whole, resumed) and not same(whole, interrupted)
    assert result.history == expected.history and result.counts == expected.counts
    assert result.moved_protected == expected.moved_protected


@pytest.mark.parametrize("name", ON_CLASSIFIERS)
def test_steps_are_of_the_sides_that_a_method_has(name) -> None:
    method = find(name)
    result = run(make(), name)
    counts = result.counts
    forgets, retains = method.forgets, method.retains
    assert bool(counts["forget_steps"]) == forgets and bool(counts["retain_steps"]) == retains
    for key, expected in (("forget_loss", forgets), ("retain_loss", retains), ("learn_loss", method.learns)):
        assert any(entry.get(key) is not None for entry in result.history) == expected
    assert any("unseen_loss" in entry for entry in result.history) == method.needs_unseen
    json.dumps(result.history)


@pytest.mark.parametrize("name", ON_CLASSIFIERS)
def test_sets_are_those_that_a_method_takes(name) -> None:
    method, given = find(name), sets(name)
    given |= {key: given["forget"] for key in ("learn", "unseen") if key not in given}
    needed = {"forget": method.forgets, "retain": method.retains, "learn": method.learns, "unseen": method.needs_unseen}
    for key, wanted in needed.items():
        chosen = {k: data for k, data in sets(name).items() if k != key} if wanted else {**sets(name), key: given[key]}
        what = f"{'an' if key == 'unseen' else 'a'} {key} set"
        words = f"{name} takes {what}" if wanted else f"{name} has no use for {what}"
        if wanted or key in ("learn", "unseen"):
            with pytest.raises(InputError, match=words):
                run(make(), name, chosen)


def test_a_set_without_steps_may_be_left_out() -> None:
    a, b = make(), make()
    run(a, "finetune", {"retain": batches(5, 6, seed=2)})
    run(b, "finetune")
    assert same(a, b)
    a, b = make(), make()
    run(a, "gradient_ascent", {"forget": batches(3, 6, seed=1)})
    run(b, "gradient_ascent")
    assert same(a, b) and not same(a, make())


def test_unseen_and_learning_data_are_not_in_another_set() -> None:
    data = sets("nabla_tau")
    for key in ("forget", "retain"):
        with pytest.raises(InputError, match=f"sample 0 of the {key} set is also in the unseen set"):
            run(make(), "nabla_tau", {**data, "unseen": data[key]})
    data = sets("ug_clu")
    with pytest.raises(InputError, match="sample 0 of the learn set is also in the forget set"):
        run(make(), "ug_clu", {**data, "learn": data["forget"]})
    run(make(), "ug_clu", {**data, "learn": data["retain"]})


def test_settings_that_a_method_has_no_use_for() -> None:
    for make_method, words in (
        (lambda: GradientAscent(slow_rate=0.5), "GradientAscent has no retain term, and slow weights follow"),
        (lambda: GradientAscent(forget_freq=2), "GradientAscent has no retain term, and between forget steps nothing"),
        (lambda: GradientAscent(update="joint"), "has no retain term, and update='joint' needs the gradients of both"),
        (lambda: Finetune(dual_state=True), "Finetune has no forget term, and dual_state is a state of forget steps"),
        (lambda: SFRon(project=True), "project=True compares both gradients at the same weights: set update='joint'"),
        (lambda: SalUn(mask_fraction=None), "protect=True needs a mask"),
        (lambda: Finetune(epochs=0), "epochs: expected a finite number above 0, or None, got 0"),
        (lambda: Scrub(msteps=4, epochs=3), "msteps: expected at most the 3 epochs, got 4"),
        (lambda: Scrub(epochs=2.5), "epochs: expected an integer from 1, got 2.5"),
        (lambda: Scrub(forget_freq=2), "scrub makes passes over one set at a time"),
        (lambda: Scrub(temperature=0), "temperature: expected a finite number above 0, got 0"),
        (lambda: parse("nabla_tau:forget_alpha=2"), "forget_alpha: expected a number from 0 to 1, or None, got 2"),
        (lambda: BadTeacher(forget_alpha=-1), "forget_alpha: expected a finite number from 0, got -1"),
        (lambda: BadTeacher(forget_alpha="auto"), "bad_teacher descends towards a replacement: give a number"),
        (lambda: SalUn(forget_freq=0), "forget_freq: expected an integer from 1, got 0"),
    ):
        with pytest.raises(InputError, match=words):
            make_method()


# --- Passes ---------------------------------------------------------------------------------------------------


def test_epochs_are_passes_over_the_retain_set() -> None:
    for name, changes, expected in (
        ("finetune", {"epochs": 3}, 15),
        ("finetune", {"epochs": 0.5}, 2),
        ("gradient_ascent", {"epochs": 4}, 12),
        ("salun", {"epochs": 2}, 10),
    ):
        assert run(make(), name, changes=changes).counts["iterations"] == expected
    unlearner = Unlearner(make(), Classification(), Finetune(epochs=2), gradient_accumulation_steps=2)
    assert unlearner.run(**sets()).counts["iterations"] == 6

    class Endless(list):
        def __len__(self):
            raise TypeError

    with pytest.raises(InputError, match="Finetune counts passes over the retain set, whose loader has no length"):
        run(make(), "finetune", {"retain": Endless(batches(5, 6, seed=2))}, {"epochs": 3})


def test_scrub_takes_its_sets_pass_by_pass() -> None:
    result = run(make(), "scrub", changes={"epochs": 3, "msteps": 2})
    kinds = "".join("f" if entry["retain_loss"] is None else "r" for entry in result.history)
    assert kinds == "fffrrrrr" + "fffrrrrr" + "rrrrr"


@pytest.mark.parametrize("name", ["random_label", "salun"])
@pytest.mark.parametrize(("forget", "retain"), [(4, 13), (1, 9), (3, 5), (5, 5), (7, 3)])
def test_an_epoch_of_a_relabelling_preset_is_a_pass_over_both_sets(name, forget, retain) -> None:
    method = parse(f"{name}@cifar10-resnet18:epochs=2")
    given = {"forget": batches(forget, 2, seed=1), "retain": batches(retain, 2, seed=2)}
    result = Unlearner(make(), Classification(), method).run(**given)
    once = min(forget, retain)  # there is one forget step at most in an iteration
    assert result.counts["iterations"] == 2 * retain and result.counts["forget_steps"] == 2 * once
    forgot = [entry["iteration"] for entry in result.history if entry["alpha"] is not None]
    assert sum(i < retain for i in forgot) == once
    gaps = {b - a for a, b in itertools.pairwise(forgot)}
    assert max(gaps) - min(gaps) <= 1, "evenly spread"


def test_a_given_forget_freq_is_what_it_was() -> None:
    for cls in (RandomLabel, SalUn):
        assert cls().forget_freq == 1
    method = parse("random_label@cifar10-resnet18:forget_freq=9")
    given = {"forget": batches(4, 2, seed=1), "retain": batches(13, 2, seed=2)}
    result = Unlearner(make(), Classification(), method).run(**given)
    assert result.counts["iterations"] == 130 and result.counts["forget_steps"] == 15


# --- Sizes of the sets ----------------------------------------------------------------------------------------


def uneven(name: str) -> dict[str, list]:
    """18 forget samples in three batches, 20 retain samples in five."""
    return {**sets(name), "forget": batches(3, 6, seed=1), "retain": batches(5, 4, seed=2)}


def test_bad_teacher_counts_every_sample_alike() -> None:
    own, given, other = make(), make(), make()
    result = run(own, "bad_teacher", uneven("bad_teacher"))
    assert {entry["alpha"] for entry in result.history} == {18 / 20}
    run(given, "bad_teacher", uneven("bad_teacher"), {"forget_alpha": 18 / 20})
    run(other, "bad_teacher", uneven("bad_teacher"), {"forget_alpha": 1.0})
    assert same(own, given) and not same(own, other)
    result = run(make(), "bad_teacher", uneven("bad_teacher"), {"forget_schedule": "linear"}, allow_duplicates=True)
    assert [entry["alpha"] for entry in result.history] == pytest.approx([0.9 * (1 - t / 12) for t in range(12)])


def test_nabla_tau_starts_from_the_share_of_samples() -> None:
    for arguments in ({}, {"allow_duplicates": True}):
        result = run(make(), "nabla_tau", uneven("nabla_tau"), **arguments)
        assert result.history[0]["alpha"] == pytest.approx(5 / 3 * 18 / 38)
    result = run(make(), "nabla_tau", uneven("nabla_tau"), {"forget_alpha": 0.25})
    assert result.history[0]["alpha"] == 0.25
    assert run(make(), "nabla_tau", {**uneven("nabla_tau"), "retain": batches(5, 1, seed=2)}).history[0]["alpha"] == 1.0


@pytest.mark.parametrize("name", ["bad_teacher", "nabla_tau", "random_label", "salun"])
def test_what_follows_from_the_sets_goes_on_after_a_stop(name, tmp_path) -> None:
    changes = {"forget_freq": None} if name in ("random_label", "salun") else {}
    whole, resumed = make(), make(seed=4)
    expected = run(whole, name, uneven(name), changes)
    stopping = {"evaluate": lambda model, step: step == 9, "evaluate_every": 1}
    run(make(), name, uneven(name), changes, output_dir=tmp_path, checkpointing_steps=7, **stopping)
    result = run(resumed, name, uneven(name), changes, output_dir=tmp_path, resume_from_checkpoint="latest")
    assert same(whole, resumed) and result.history == expected.history


def test_nabla_tau_goes_on_from_a_checkpoint_without_its_strength() -> None:
    """Older ones hold tau alone: the share is that of batches, as it was."""
    method = NablaTau(iterations=10)
    method.begin({"forget": 1, "retain": 4})
    method.load_state({"tau": 0.5})
    assert method.strength(0) == pytest.approx(5 / 3 * 1 / 5) and method.strength(5) == pytest.approx(1 / 6)


def test_a_method_serves_several_sets_in_turn() -> None:
    """What it took from the first is not left for the second."""
    for method, first, second in (
        (BadTeacher(iterations=2), 18 / 20, 6 / 20),
        (NablaTau(iterations=2), 5 / 3 * 18 / 38, 5 / 3 * 6 / 26),
    ):
        for forget, expected in ((batches(3, 6, seed=1), first), (batches(1, 6, seed=1), second)):
            data = {**uneven(method.name), "forget": forget}
            result = Unlearner(make(), Classification(), method).run(**data)
            assert result.history[0]["alpha"] == pytest.approx(expected)


# --- Unseen data ----------------------------------------------------------------------------------------------


def test_tau_is_measured_at_every_pass_and_disturbs_nothing() -> None:
    a, b = run(make(), "nabla_tau"), run(make(), "nabla_tau")
    assert [i for i, entry in enumerate(a.history) if "unseen_loss" in entry] == [0, 5, 10]
    model = make().eval()
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(x), y, reduction="none") for x, y in sets("nabla_tau")["unseen"]]
    assert a.history[0]["unseen_loss"] == pytest.approx(torch.cat(losses).double().mean().item(), rel=1e-6)
    assert a.history == b.history

    class Drawing(list):
        """Draws from the global generator where it is measured, as a shuffling loader does."""

        def __iter__(self):
            if not torch.is_grad_enabled():
                torch.rand(3)
            return super().__iter__()

    models = make(dropout=0.5), make(dropout=0.5)  # which draw from it as well
    for net, kind in zip(models, (list, Drawing), strict=True):
        data = loaders("nabla_tau")
        torch.manual_seed(3)
        run(net, "nabla_tau", {**data, "unseen": kind(batches(2, 6, seed=6))})
    assert same(*models)


def test_unseen_data_of_no_finite_loss() -> None:
    data = sets("nabla_tau")
    data["unseen"] = [(x * float("nan"), y) for x, y in data["unseen"]]
    model = make()
    with pytest.raises(NonFiniteError, match="a loss on unseen data is not finite"):
        run(model, "nabla_tau", data)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), make().parameters(), strict=True))


def test_what_does_not_add_up_over_batches() -> None:
    with pytest.raises(InputError, match="nabla_tau takes a function of a whole batch's losses"):
        Unlearner(make(), Classification(), "nabla_tau", gradient_accumulation_steps=2)


@pytest.mark.parametrize("name", [n for n in ON_CLASSIFIERS if find(n).adds_up])
def test_accumulated_batches_make_the_step_of_one_large_batch(name) -> None:
    """Without batch normalisation, which sees a batch at a time."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(50, 7), nn.Tanh(), nn.Linear(7, 4)).double()

    forget, retain, learn = (batches(6, 4, seed=seed, dtype=torch.float64) for seed in (1, 2, 5))
    models = [net(), net()]
    for model, steps in zip(models, (2, 1), strict=True):
        data = {"forget": forget, "retain": retain} | ({"learn": learn} if find(name).learns else {})
        if steps == 1:
            data = {
                key: [tuple(torch.cat(t) for t in zip(*whole[i : i + 2], strict=True)) for i in (0, 2, 4)]
                for key, whole in data.items()
            }
        changes = {"mask": None} if name != "salun" else {"mask": some_mask(model)}
        changes |= {"gamma": None} if name in ("sfron", "ug_clu") else {}
        method = short(name, rule="momentum", **changes)
        Unlearner(model, Classification(), method, gradient_accumulation_steps=steps).run(**data)
    assert not same(models[0], net())
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["finetune", "gradient_ascent", "random_label", "salun", "scrub"])
def test_steps_in_the_backward_pass_are_the_same(name) -> None:
    models = [make(), make()]
    for model, own in zip(models, (False, True), strict=True):
        Unlearner(model, Classification(), short(name), optimizer_in_backward=own).run(**sets())
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert not same(models[1], make())


def test_methods_whose_gradients_are_added_up_take_no_step_in_the_backward_pass() -> None:
    for name, words in (("ug_clu", "adds up the gradients of two sets"), ("projected", "needs the gradients of both")):
        with pytest.raises(InputError, match=words):
            Unlearner(make(), Classification(), short(name), optimizer_in_backward=True)


def some_mask(model: nn.Module) -> SaliencyMask:
    generator = torch.Generator().manual_seed(1)
    return SaliencyMask.from_dict(
        {n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in model.named_parameters()}
    )


# --- SalUn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["momentum", "adamw"])
@pytest.mark.parametrize("update", ["sequential", "joint"])
def test_salun_moves_no_other_weight(rule, update) -> None:
    model = make()
    before = copy.deepcopy(model)
    settings = {"rule": rule, "weight_decay": 0.1, "update": update, "mask_fraction": 0.3}
    settings |= {"momentum": 0.9} if rule == "momentum" else {}
    result = run(model, "salun", changes=settings)
    assert result.moved_protected == 0 and "0 of" in result.protection
    total = sum(p.numel() for p in model.parameters())
    assert result.mask.kept == int(0.3 * total) and result.mask.metadata["mask_fraction"] == "0.3"
    for (name, p), old in zip(model.named_parameters(), before.parameters(), strict=True):
        mask = result.mask.unpack()[name]
        assert torch.equal(p[~mask], old[~mask])
        assert not mask.any() or not torch.equal(p[mask], old[mask])
    assert set(result.timings) == {"gradients", "mask", "unlearning"}


def test_a_ready_mask_for_salun() -> None:
    model = make()
    result = run(model, "salun", changes={"mask": some_mask(model)})
    assert result.moved_protected == 0 and "gradients" not in result.timings


def test_the_sum_of_gradients_is_plain() -> None:
    model, data = make().double().eval(), batches(3, 6, seed=1, dtype=torch.float64)
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in data:
        found = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), [*model.parameters()])
        expected = [total + g for total, g in zip(expected, found, strict=True)]
    sums = GradientSum(model, Classification()).measure(data).sums
    for total, plain in zip(sums.values(), expected, strict=True):
        torch.testing.assert_close(total, plain, rtol=0, atol=1e-12)
    for option in ({"max_norm": 1.0}, {"per_sample": True}, {"batches": 1}):  # of squares
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            GradientSum(model, Classification(), **option)


def test_salun_measures_in_the_backward_pass_too() -> None:
    masks = []
    for own in (False, True):
        unlearner = Unlearner(make(), Classification(), short("salun"), optimizer_in_backward=own)
        masks.append(unlearner.run(**sets()).mask)
    assert masks[0] == masks[1]


def test_a_mask_protects_a_run_of_forget_steps_alone() -> None:
    """Every step is masked, whatever the scope."""
    model = make()
    result = run(model, "gradient_ascent", changes={"mask": some_mask(model), "protect": True})
    assert result.moved_protected == 0
