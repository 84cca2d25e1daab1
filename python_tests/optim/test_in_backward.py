"""Steps and Fisher sums in the backward pass: the same bits as ordinary ones, with fewer gradients alive."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.in_backward import (
    Net,
    Spoilt,
    assert_same,
    dit,
    dit_loss,
    everything,
    loss_of,
    mask_of,
    optimizer_of,
    steps,
)
from helpers.layouts import RULES
from helpers.models import ConvNet, WithUnused, batches, make
from torch import Tensor, nn

from unlearn_ext import FisherDiagonal, InputError, NonFiniteError, Unlearner, UnlearnOptimizer, ops
from unlearn_ext.jobs.trial import try_batch
from unlearn_ext.methods import SFRon
from unlearn_ext.optim import in_backward as steps_in_backward
from unlearn_ext.tasks import Classification
from unlearn_ext.utils import grad_hooks

# --- The same weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"masked": True, "protect": True},
        {"masked": True, "protect": True, "mask_scope": "all", "slow_rate": 0.5, "slow_freq": 2},
        {"masked": True, "groups": True, "slow_rate": 0.5, "slow_freq": 3},
        {"dual_state": True, "forget_rule": "adam", "forget_lr": 0.01, "masked": True},
        {"groups": True, "dual_state": True, "slow_rate": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", RULES)
def test_weights_and_state_are_the_ordinary_steps_to_the_bit(rule: str, options: dict, dtype: torch.dtype) -> None:
    hyper = {"rule": rule, "weight_decay": 0.03, "momentum": 0.9 if rule == "momentum" else 0.0}
    found = []
    for in_backward in (False, True):
        model = Net(dtype)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = optimizer_of(model, **hyper, **options)
        steps(optimizer, model, in_backward)
        found.append(everything(model, optimizer))
        still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
        assert still == ["unused", "frozen.weight", "frozen.bias"]
        assert optimizer.param_groups[0]["retain_steps"] == 5
        own = "forget_step" if options.get("dual_state") else "step"
        assert optimizer.state[model.second.weight][own] == (3 if options.get("dual_state") else 8)
        assert optimizer.last_clip == 1.0
    assert_same(*found)


@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_retain_steps_in_backward_are_torch_optims(rule: str) -> None:
    model, other = Net(torch.float64), Net(torch.float64)
    common = {"lr": 0.05, "weight_decay": 0.1}
    own = optimizer_of(model, rule=rule, momentum=0.9 if rule == "momentum" else 0.0, **common)
    maker = torch.optim.AdamW if rule == "adamw" else torch.optim.SGD
    theirs = maker(other.parameters(), **common, **({"momentum": 0.9} if rule == "momentum" else {}))
    for t in range(6):
        with own.step_in_backward("retain"):
            loss_of(model, t).backward()
        theirs.zero_grad()
        loss_of(other, t).backward()
        theirs.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_what_only_a_forget_step_moved_is_interpolated() -> None:
    a, b = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    optimizer = UnlearnOptimizer([a, b], rule="sgd", lr=0.5, slow_rate=0.25)
    with optimizer.step_in_backward("forget"):
        b.sum().backward()
    assert (a.item(), b.item()) == (1.0, 0.5)
    with optimizer.step_in_backward("retain"):
        (4 * a).sum().backward()
    assert (a.item(), b.item()) == (1 + 0.25 * -2, 1 + 0.25 * -0.5)


CLIPS = [{"max_norm": 0.05}, {"max_norm": 0.05, "retain_max_norm": 0.3, "fisher_max_norm": 0.2}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("clips", CLIPS, ids=("as released for DiT", "as released for DDPM"))
def test_a_run_whose_norms_are_measured_first(clips: dict, dtype: torch.dtype) -> None:
    """The sums of squares have another order, so that the last bits of a float64 clip factor may differ."""
    settings = {"rule": "momentum", "lr": 0.02, "momentum": 0.9, "iterations": 6, "forget_freq": 2, "gamma": 0.9}
    data = {"forget": batches(3, 6, seed=1, dtype=dtype), "retain": batches(5, 6, seed=2, dtype=dtype)}
    found, clips_of = [], []
    for in_backward in (False, True):
        model = make(WithUnused).to(dtype)
        method = SFRon(**settings, **clips)
        result = Unlearner(model, Classification(), method, optimizer_in_backward=in_backward).run(**data)
        clips_of.append([entry["clip"] for entry in result.history if entry["clip"] is not None])
        assert result.counts["forget_steps"] == 3 and result.counts["retain_steps"] == 6
        found.append((model.state_dict(), result.mask))
    assert found[0][1] == found[1][1]
    assert clips_of[1] == pytest.approx(clips_of[0], rel=1e-14 if dtype == torch.float64 else 1e-6)
    assert len(clips_of[0]) == 3 and all(0 < clip < 1 for clip in clips_of[0])
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=1e-12)


@pytest.mark.parametrize("masked", (False, True))
def test_clipped_forget_steps_are_torch_optims(masked: bool) -> None:
    """Masked by hand, clipped by torch, weighted by the group."""
    model, other = Net(torch.float64), Net(torch.float64)
    options = {"rule": "adamw", "lr": 0.05, "weight_decay": 0.1, "max_norm": 0.02, "forget_weight": 3.0}
    own = optimizer_of(model, masked=masked, **options)
    theirs = torch.optim.AdamW(other.parameters(), lr=0.05, weight_decay=0.1)
    keep = mask_of(model).unpack()
    for t in range(4):
        loss = loss_of(model, t)
        with own.norm_in_backward("forget"):
            loss.backward(retain_graph=True)
        before = everything(model, own)
        assert all(p.grad is None for p in model.parameters())
        with own.step_in_backward("forget"):
            loss.backward()
        assert before.keys() <= everything(model, own).keys()
        theirs.zero_grad()
        (3.0 * loss_of(other, t)).backward()
        for name, p in other.named_parameters():
            if masked and p.grad is not None:
                p.grad = torch.where(keep[name], p.grad, 0)
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.02)
        assert float(own.last_clip) == pytest.approx(0.02 / (float(norm) + 1e-6), rel=1e-12) and own.last_clip < 1
        theirs.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


def test_a_norm_is_for_one_step() -> None:
    model = Net()
    optimizer = optimizer_of(model, rule="sgd", max_norm=1.0)
    words = r"^step_in_backward: max_norm clips by the norm of all gradients: measure it first"
    for between in (None, "forget", "retain", "ordinary"):
        optimizer.zero_grad()
        if between is not None:
            loss = loss_of(model, 0)
            with optimizer.norm_in_backward("forget"):
                loss.backward(retain_graph=True)
            with contextlib.nullcontext() if between == "ordinary" else optimizer.step_in_backward(between):
                loss.backward()
            if between == "ordinary":
                optimizer.retain_step()
        with pytest.raises(InputError, match=words):
            optimizer.step_in_backward("forget").__enter__()
    with pytest.raises(InputError, match=r"^side: expected one of forget, retain, got 'both'"):
        optimizer.step_in_backward("both").__enter__()


def test_where_the_norm_is_measured_nothing_breaks() -> None:
    """A gradient that is not finite is found before anything moves, as in an ordinary step."""
    model = Spoilt()
    optimizer = optimizer_of(model, rule="sgd", retain_max_norm=1.0)
    before = everything(model, optimizer)
    model.factor = float("inf")
    words = "retain_step: the retain gradient of middle is not finite and no weight was changed"
    with pytest.raises(NonFiniteError, match=words), optimizer.norm_in_backward("retain"):
        model().backward(retain_graph=True)
    assert_same(before, everything(model, optimizer))
    model.factor = 1.0
    loss = model()
    with optimizer.norm_in_backward("retain"):
        loss.backward(retain_graph=True)
    with optimizer.step_in_backward("retain"):
        loss.backward()


@pytest.mark.parametrize("checkpointed", (False, True))
def test_a_dit_with_tied_embedders(checkpointed: bool) -> None:
    """A tied weight moves once, when its gradient is summed over all blocks; recomputed blocks see weights that have
    not moved."""
    from unlearn_ext.models.weights import tie_embeddings

    found = []
    for in_backward in (False, True):
        model = dit().train()
        for p in model.proj_out_2.parameters():  # zero at first, and then nothing else has a gradient
            nn.init.normal_(p, std=0.1)
        assert tie_embeddings(model) > 0
        if checkpointed:
            model.enable_gradient_checkpointing()
        optimizer = optimizer_of(model, rule="adamw", lr=1e-3, masked=True)
        torch.manual_seed(0)  # of dropped labels
        steps(optimizer, model, in_backward, 3, dit_loss)
        shared = model.transformer_blocks[0].norm1.emb.timestep_embedder.linear_1.weight
        assert shared is model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.weight
        assert optimizer.state[shared]["step"] == 5
        found.append(everything(model, optimizer))
    assert_same(*found)


def test_small_gradients_share_a_call(monkeypatch) -> None:
    """All of a small network arrive together, in as many calls as groups; one at a time they give the same bits."""
    found, calls = [], []
    step = ops.step_

    def watched(weights: list[Tensor], **arguments: Any) -> None:
        calls.append(len(weights))
        step(weights, **arguments)

    monkeypatch.setattr(steps_in_backward.ops, "step_", watched)
    for waiting in (1 << 18, 1):
        monkeypatch.setattr(grad_hooks, "_WAITING", {"cpu": waiting})
        torch.manual_seed(0)
        model = Net()
        optimizer = optimizer_of(model, groups=True, masked=True, rule="adamw")
        calls.clear()
        steps(optimizer, model, True, 2)
        found.append(everything(model, optimizer))
        # Biases and weights, in a forget and two retain steps; those end with the slow weight that has no gradient.
        assert set(calls) == {1} if waiting == 1 else calls == [4, 3, 4, 3, 1, 4, 3, 1]
    assert_same(*found)


@pytest.mark.slow
def test_a_compiled_model_is_passed_twice() -> None:
    """Where norms are measured first; a program that was compiled for one pass is told."""
    settings = {"rule": "momentum", "lr": 0.02, "momentum": 0.9, "iterations": 3, "gamma": 0.9}
    settings |= {"max_norm": 0.2, "fisher_max_norm": 0.5}
    data, found = {"forget": batches(2, 6, seed=1), "retain": batches(2, 6, seed=2)}, []
    for in_backward in (False, True):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = ConvNet()
        compiled = torch.compile(model)
        Unlearner(compiled, Classification(), SFRon(**settings), optimizer_in_backward=in_backward).run(**data)
        found.append([p.detach() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    torch.compiler.reset()
    compiled = torch.compile(ConvNet())
    optimizer = UnlearnOptimizer(compiled.named_parameters(), rule="sgd", lr=0.1, max_norm=1.0)
    inputs, labels = data["forget"][0]
    loss = nn.functional.cross_entropy(compiled(inputs), labels)
    words = r"compiled for one pass: set torch\._functorch\.config\.donated_buffer"
    with pytest.raises(InputError, match=words), optimizer.norm_in_backward("forget"):
        loss.backward(retain_graph=True)


def test_stochastic_rounding_draws_by_place_and_step() -> None:
    """Two weights of equal values and gradients draw different noise, and the order of backward is of no account."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)) for _ in range(2))

    def moved(order: str) -> list[list[Tensor]]:
        torch.manual_seed(3)
        model, path = Two(), []
        optimizer = optimizer_of(model, rule="sgd", lr=2.0**-12, stochastic_rounding=True)
        for _ in range(2):
            with optimizer.step_in_backward("retain"):
                for name in order:  # two graphs, one after the other
                    getattr(model, name).sum().backward()
            path.append([model.a.detach().clone(), model.b.detach().clone()])
        return path

    ab, ba = moved("ab"), moved("ba")
    assert all(torch.equal(x, y) for one, two in zip(ab, ba, strict=True) for x, y in zip(one, two, strict=True))
    assert not torch.equal(*ab[0])
    assert not torch.equal(ab[0][0] < 1, ab[1][0] < ab[0][0]), "another step, other noise"
    assert all(0 < float((x < 1).float().mean()) < 0.5 for x in ab[0])


# --- Fewer gradients --------------------------------------------------------------------------------------------


def test_the_gradients_alive_fall_to_those_of_one_layer() -> None:
    model = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(10)))
    layer = 4 * 100 * 100

    def peak(**options: int) -> int:
        return try_batch(model, lambda: model(torch.ones(1, 100)).sum(), **options).peak

    assert peak() == pytest.approx(10 * layer, rel=0.05)
    assert peak(passes_in_backward=1) == pytest.approx(layer, rel=0.25)  # and a few rows of activations
    assert peak(passes_in_backward=2) == pytest.approx(layer, rel=0.25)


def test_the_gradients_alive_of_a_dit_fall_to_about_the_largest_layers() -> None:
    """Beside a forward pass of one small sample. A block's modulation is its largest weight, and a gradient of it."""
    model = dit(layers=6, heads=4, head_dim=32)
    each = [4 * p.numel() for p in model.parameters()]

    def peak(passes: int) -> int:
        return try_batch(model, lambda: dit_loss(model, 0, count=1), passes_in_backward=passes).peak

    whole, freed, twice = peak(0), peak(1), peak(2)
    with torch.no_grad():
        dit_loss(model, 0, count=1)
    activations = try_batch(model.requires_grad_(False), _without_backward(model)).peak
    assert whole > sum(each)
    assert freed < 0.25 * whole and max(freed, twice) < activations + 3 * max(each)


def _without_backward(model: nn.Module) -> Callable[[], Tensor]:
    """All that the forward pass keeps, with the gradient of one number that no weight has."""
    one = torch.ones((), requires_grad=True)

    def loss() -> Tensor:
        rng = torch.Generator().manual_seed(0)
        x = torch.randn(1, 4, 8, 8, generator=rng) * one
        return model(x, timestep=torch.tensor([5]), class_labels=torch.tensor([1])).sample.square().mean()

    return loss


# --- Fisher -----------------------------------------------------------------------------------------------------


def test_fisher_sums_are_the_ordinary_ones_to_the_bit() -> None:
    model, data = make(WithUnused), batches(4, 6, seed=1)
    ordinary = FisherDiagonal(model, Classification(), batches=3).measure(data)
    freed = FisherDiagonal(model, Classification(), batches=3, in_backward=True).measure(data)
    assert_same(freed.sums, ordinary.sums)
    assert freed.seen == ordinary.seen and "unused" not in freed.seen and freed.count == ordinary.count == 3
    assert all(p.grad is None for p in model.parameters())


def test_fisher_whose_gradients_are_clipped() -> None:
    model, data = make(WithUnused).double().eval(), batches(4, 6, seed=1, dtype=torch.float64)
    ordinary = FisherDiagonal(model, Classification(), max_norm=0.1).measure(data)
    freed = FisherDiagonal(model, Classification(), max_norm=0.1, in_backward=True).measure(data)
    whole = FisherDiagonal(model, Classification(), in_backward=True).measure(data)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for inputs, labels in data:
        model.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        assert float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)) > 0.1
        for name, p in model.named_parameters():
            expected[name] += 0 if p.grad is None else p.grad**2
    for name, total in ordinary.sums.items():
        torch.testing.assert_close(freed.sums[name], total, rtol=1e-13, atol=0)
        torch.testing.assert_close(freed.sums[name], expected[name], rtol=1e-10, atol=1e-30)
        assert name == "unused" or float(total.sum()) < 0.5 * float(whole.sums[name].sum())
    with pytest.raises(InputError, match="in_backward is for batch gradients, and per_sample has no backward pass"):
        FisherDiagonal(model, Classification(), in_backward=True, per_sample=True)
