"""Fisher diagonals against plain PyTorch, and the masks that are made of them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers.masks import assert_equal, masks, trained
from helpers.models import ConvNet, WithUnused, batches, make
from torch import Tensor, nn
from torch.nn import functional

from unlearn_ext import ops
from unlearn_ext.errors import InputError, NonFiniteError
from unlearn_ext.saliency import FisherDiagonal, SaliencyMask, _parts
from unlearn_ext.saliency import fisher as fisher_module
from unlearn_ext.saliency.selection import _on_host
from unlearn_ext.tasks import Classification
from unlearn_ext.utils import grad_hooks


def gradients(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    functional.cross_entropy(model(inputs), labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_fisher(model: nn.Module, data: list, per_sample: bool = False) -> dict[str, Tensor]:
    model = copy.deepcopy(model).eval()
    parts = [(x[i : i + 1], y[i : i + 1]) for x, y in data for i in range(len(y))] if per_sample else data
    squares = [{name: g**2 for name, g in gradients(model, *part).items()} for part in parts]
    return {name: sum(s[name] for s in squares) / len(squares) for name in squares[0]}


@pytest.mark.parametrize("per_sample", (False, True), ids=("batch", "sample"))
def test_fisher_in_float64(per_sample: bool) -> None:
    model = trained()
    data = batches(3, 11, seed=1, dtype=torch.float64)
    data[-1] = (data[-1][0][:3], data[-1][1][:3])  # chunks of 8 + 3, and 3
    fisher = FisherDiagonal(model, Classification(), per_sample=per_sample).measure(data)
    assert fisher.count == (25 if per_sample else 3)
    expected = plain_fisher(model, data, per_sample)
    means = fisher.means()
    assert list(means) == list(expected) == [name for name, _ in model.named_parameters()]
    for name, want in expected.items():
        torch.testing.assert_close(means[name], want, rtol=1e-12, atol=1e-18)
        assert want.max() > 0
    assert all(p.grad is None for p in model.parameters())


def test_per_sample_does_not_depend_on_the_chunk() -> None:
    model, data = trained(), batches(2, 7, seed=1, dtype=torch.float64)
    one, many = (FisherDiagonal(model, Classification(), per_sample=True, chunk=n).measure(data) for n in (1, 100))
    for name in one.sums:
        torch.testing.assert_close(one.sums[name], many.sums[name], rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("options", ({"in_backward": True}, {"per_sample": True, "chunk": 3}), ids=str)
def test_gradients_are_squared_some_at_a_time(options, monkeypatch) -> None:
    """As large models have it: each call of the operator takes one tensor."""
    model, data, calls = trained(), batches(2, 7, seed=1, dtype=torch.float64), []
    monkeypatch.setattr(_parts, "_AT_ONCE", {"cpu": 1})
    monkeypatch.setattr(grad_hooks, "_WAITING", {"cpu": 1})
    accumulate = fisher_module.ops.accumulate_fisher_

    def watched(sums: list[Tensor], grads: list[Tensor], weight: float = 1.0) -> None:
        calls.append(len(sums))
        assert all(p.grad is None for p in model.parameters())
        accumulate(sums, grads, weight)

    monkeypatch.setattr(fisher_module.ops, "accumulate_fisher_", watched)
    means = FisherDiagonal(model, Classification(), **options).measure(data).means()
    for name, want in plain_fisher(model, data, "per_sample" in options).items():
        torch.testing.assert_close(means[name], want, rtol=1e-12, atol=1e-18)
    assert calls == [1] * (len(means) * (14 if "per_sample" in options else 2))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("per_sample", (False, True), ids=("batch", "sample"))
def test_fisher_takes_so_many_batches(per_sample: bool) -> None:
    model, data = trained(), batches(5, 4, seed=1, dtype=torch.float64)
    drawn: list[int] = []

    def counted() -> Any:
        for i, batch in enumerate(data):
            drawn.append(i)
            yield batch

    seen: list[Any] = []
    options = {"per_sample": per_sample, "batches": 2}
    limited = FisherDiagonal(model, Classification(), **options).measure(counted())
    assert drawn == [0, 1]
    watched = FisherDiagonal(model, Classification(), **options).measure(counted(), watch=seen.append)
    assert len(seen) == 5 and seen[1] is data[1]  # who watches sees all
    for name, want in plain_fisher(model, data[:2], per_sample).items():
        torch.testing.assert_close(limited.means()[name], want, rtol=1e-12, atol=1e-18)
        assert torch.equal(watched.means()[name], limited.means()[name])
    with pytest.raises(InputError, match="Fisher batches: expected an integer from 1, got 0"):
        FisherDiagonal(model, Classification(), batches=0)


def test_fisher_adds_up_over_passes() -> None:
    model, data = trained(), batches(4, 4, seed=1, dtype=torch.float64)
    whole = FisherDiagonal(model, Classification()).measure(data)
    parts = FisherDiagonal(model, Classification()).measure(data[:1]).measure(data[1:])
    assert whole.count == parts.count == 4
    assert all(torch.equal(whole.sums[name], parts.sums[name]) for name in whole.sums)


@pytest.mark.parametrize("per_sample", (False, True), ids=("batch", "sample"))
def test_fisher_measures_in_eval_mode_and_puts_modes_back(per_sample: bool) -> None:
    model = make(ConvNet, dropout=0.5).double()
    model.train()
    model.norm.eval()  # as those do who freeze batch normalisation
    buffers = copy.deepcopy(dict(model.named_buffers()))
    data = batches(2, 4, seed=1, dtype=torch.float64)
    modes: list[list[bool]] = []
    task = Classification()
    fisher = FisherDiagonal(model, task, per_sample=per_sample)
    fisher.measure(data, watch=lambda _: modes.append([m.training for m in model.modules()]))
    assert not any(map(any, modes)) and len(modes) == 2
    assert [m.training for m in model.modules()] == [m is not model.norm for m in model.modules()]
    assert all(torch.equal(buffers[name], value) for name, value in model.named_buffers())
    for name, want in plain_fisher(model, data, per_sample).items():
        torch.testing.assert_close(fisher.means()[name], want, rtol=1e-12, atol=1e-18)
    data[1][0][0] = math.nan
    with pytest.raises(NonFiniteError):
        FisherDiagonal(model, task, per_sample=per_sample).measure(data)
    assert [m.training for m in model.modules()] == [m is not model.norm for m in model.modules()]


@pytest.mark.parametrize("per_sample", (False, True), ids=("batch", "sample"))
def test_a_weight_without_gradient_is_kept_out(per_sample: bool) -> None:
    """Its two Fisher sums are 0 and their ratio is 1: by the ratio alone it would be kept."""
    model = trained(model=WithUnused)
    forget, retain = (batches(2, 4, seed=s, dtype=torch.float64) for s in (1, 2))
    options = {"per_sample": per_sample}
    fishers = [FisherDiagonal(model, Classification(), **options).measure(data) for data in (forget, retain)]
    assert "unused" not in fishers[0].seen
    unpacked = SaliencyMask.from_fisher(*fishers).unpack()
    assert unpacked["unused"].shape == (5,) and not unpacked["unused"].any()
    assert any(mask.any() for mask in unpacked.values())


@pytest.mark.parametrize("gamma, eps", [(1.0, 1e-15), (2.5, 1e-6)])
@pytest.mark.parametrize("channels_last", (False, True))
def test_from_fisher(gamma: float, eps: float, channels_last: bool) -> None:
    model = trained()
    if channels_last:
        model.conv.to(memory_format=torch.channels_last)
        assert not model.conv.weight.is_contiguous()
    forget, retain = (batches(count, 4, seed=count, dtype=torch.float64) for count in (2, 3))
    fishers = [FisherDiagonal(model, Classification()).measure(data) for data in (forget, retain)]
    assert fishers[0].sums["conv.weight"].stride() == model.conv.weight.stride()
    mask = SaliencyMask.from_fisher(*fishers, gamma=gamma, eps=eps, metadata={"seed": "4"})
    f, r = plain_fisher(model, forget), plain_fisher(model, retain)
    expected = {name: (f[name] + eps) / (r[name] + eps) >= gamma for name in f}
    assert_equal(mask.unpack(), expected)
    assert 0 < mask.density < 1
    assert mask.metadata == {"gamma": repr(gamma), "seed": "4"}
    bound = dict(zip(expected, mask.bind(model.named_parameters()), strict=True))
    for name, p in model.named_parameters():
        assert torch.equal(ops.unpack_bits([bound[name]], [p])[0], expected[name])


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("fraction", (0.0, 0.3, 1.0))
def test_from_fisher_by_fraction(fraction: float, channels_last: bool) -> None:
    """⌊fraction·N⌋ of all weights, from those that received a gradient."""
    model = trained(model=WithUnused)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    data = (batches(count, 4, seed=count, dtype=torch.float64) for count in (2, 3))
    fishers = [FisherDiagonal(model, Classification()).measure(d) for d in data]
    mask = SaliencyMask.from_fisher(*fishers, mask_fraction=fraction)
    assert mask.metadata == {"mask_fraction": repr(fraction)}
    f, r = (fisher.means() for fisher in fishers)
    ratios = {name: ((f[name] + 1e-15) / (r[name] + 1e-15)).contiguous() for name in f if name != "unused"}
    flat = torch.cat([ratio.flatten() for ratio in ratios.values()])
    k = min(int(fraction * mask.total), flat.numel())
    keep = torch.zeros(flat.numel(), dtype=torch.bool)
    keep[flat.sort(descending=True, stable=True).indices[:k]] = True
    parts = keep.split([ratio.numel() for ratio in ratios.values()])
    expected = {name: part.view(f[name].shape) for name, part in zip(ratios, parts, strict=True)}
    unpacked = mask.unpack()
    assert list(unpacked) == list(f) and not unpacked.pop("unused").any()
    assert_equal(unpacked, expected)
    assert mask.kept == k


def test_words_that_came_from_a_device_together_can_be_saved(tmp_path) -> None:
    named = masks()
    words = ops.pack_bits(list(named.values()))
    together = _on_host(words)  # views of one tensor
    mask = SaliencyMask(dict(zip(named, together, strict=True)), {name: tuple(m.shape) for name, m in named.items()})
    assert mask == SaliencyMask.from_dict(named)
    mask.save(tmp_path / "mask.safetensors")
    assert SaliencyMask.load(tmp_path / "mask.safetensors") == mask


def test_gamma_and_fraction_exclude_each_other() -> None:
    fishers = [FisherDiagonal(make(ConvNet), Classification()).measure(batches(1, 4, seed=s)) for s in (1, 2)]
    with pytest.raises(InputError, match="gamma and mask_fraction both say"):
        SaliencyMask.from_fisher(*fishers, gamma=1.0, mask_fraction=0.5)
    with pytest.raises(InputError, match=r"mask_fraction: expected a number from 0 to 1, got 1\.5"):
        SaliencyMask.from_fisher(*fishers, mask_fraction=1.5)
    assert SaliencyMask.from_fisher(*fishers) == SaliencyMask.from_fisher(*fishers, gamma=1.0)


def test_fishers_of_different_models_are_refused() -> None:
    data = batches(1, 4, seed=1)
    one, other = (FisherDiagonal(make(m), Classification()).measure(data) for m in (ConvNet, WithUnused))
    with pytest.raises(InputError, match="two Fisher diagonals are of different parameters"):
        SaliencyMask.from_fisher(one, other)


@pytest.mark.parametrize("per_sample", (False, True), ids=("batch", "sample"))
def test_fisher_of_a_bfloat16_model(per_sample: bool) -> None:
    """Squares of bfloat16 gradients, summed in float32: small ones must not be lost."""
    model = trained(torch.bfloat16)
    data = batches(12, 2, seed=1, dtype=torch.bfloat16)
    fisher = FisherDiagonal(model, Classification(), per_sample=per_sample, chunk=1).measure(data)
    assert {total.dtype for total in fisher.sums.values()} == {torch.float32}
    model.eval()
    task, sums = Classification(), {name: torch.zeros(p.shape).double() for name, p in model.named_parameters()}
    for x, y in data:
        for part in [(x[i : i + 1], y[i : i + 1]) for i in range(2)] if per_sample else [(x, y)]:
            model.zero_grad()
            task.losses(model, part).mean().backward()
            for name, p in model.named_parameters():
                sums[name] += p.grad.double() ** 2
    # vmap's kernels may round a bfloat16 gradient the other way.
    tolerance = 2e-2 if per_sample else 1e-5
    for name, want in sums.items():
        assert (fisher.sums[name].double() - want).norm() <= tolerance * want.norm(), name


def test_frozen_weights_are_not_measured() -> None:
    model = trained()
    model.conv.requires_grad_(False)
    for per_sample in (False, True):
        fisher = FisherDiagonal(model, Classification(), per_sample=per_sample)
        fisher.measure(batches(1, 4, seed=1, dtype=torch.float64))
        assert list(fisher.sums) == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
        assert fisher.seen == set(fisher.sums)
    with pytest.raises(InputError, match="the model has no trainable weights"):
        FisherDiagonal(model.requires_grad_(False), Classification())


@pytest.mark.parametrize("per_sample", (False, True), ids=("batch", "sample"))
def test_wrapped_models_have_plain_names(per_sample: bool) -> None:
    model = trained()
    data = batches(2, 4, seed=1, dtype=torch.float64)
    plain, wrapped = (
        FisherDiagonal(m, Classification(), per_sample=per_sample).measure(data)
        for m in (model, nn.DataParallel(model))
    )
    assert list(plain.sums) == list(wrapped.sums)
    assert all(torch.equal(plain.sums[name], wrapped.sums[name]) for name in plain.sums)


@pytest.mark.parametrize("per_sample", (False, True), ids=("batch", "sample"))
def test_fisher_of_bad_data(per_sample: bool) -> None:
    model = trained()

    def fisher() -> FisherDiagonal:
        return FisherDiagonal(model, Classification(), per_sample=per_sample)

    with pytest.raises(InputError, match=r"^the forget set is empty: pass at least one batch$"):
        fisher().measure([], name="forget")
    data = batches(3, 4, seed=1, dtype=torch.float64)
    data[2][0][1, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"^Fisher: the loss of batch 2 of the retain set is nan; check the data"):
        fisher().measure(data, name="retain")
    huge = Classification(loss=lambda logits, labels: logits.sum(1) * 1e200)
    with pytest.raises(NonFiniteError, match=r"^Fisher of the retain set: a squared gradient is not finite"):
        FisherDiagonal(model, huge, per_sample=per_sample).measure(data[:1], name="retain")
