"""Masks by name: density, binding to a model's parameters, fractions of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.layouts import coin, normal
from helpers.masks import assert_equal, masks, parameters_of
from hypothesis import given
from hypothesis import strategies as st

from unlearn_ext import ops
from unlearn_ext.errors import InputError
from unlearn_ext.saliency import SaliencyMask
from unlearn_ext.saliency.selection import _part_of

# --- Masks --------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_unpack_undoes_from_dict(data: st.DataObject) -> None:
    sizes = st.one_of(st.sampled_from((0, 1, 31, 32, 33, 63, 64, 65)), st.integers(0, 5))
    shapes = data.draw(st.lists(st.lists(sizes, max_size=3), min_size=1, max_size=5))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    given_masks = {f"w{i}": coin(rng, shape) for i, shape in enumerate(shapes)}
    if data.draw(st.booleans()):
        given_masks = {name: m.mT if m.dim() >= 2 else m for name, m in given_masks.items()}
    mask = SaliencyMask.from_dict(given_masks)
    unpacked = mask.unpack()
    assert_equal(unpacked, given_masks)
    assert all(m.is_contiguous() and m.device.type == "cpu" for m in unpacked.values())
    assert mask.kept == sum(int(m.sum()) for m in given_masks.values())
    assert mask.total == sum(m.numel() for m in given_masks.values())
    assert SaliencyMask.from_dict(unpacked) == mask


def test_density() -> None:
    mask = SaliencyMask.from_dict(
        {"a": torch.tensor([True, False, False, True]), "b": torch.zeros(0, dtype=torch.bool), "c": torch.tensor(True)}
    )
    assert (mask.kept, mask.total, mask.density) == (3, 5, 0.6)
    assert mask.shapes == {"a": (4,), "b": (0,), "c": ()}
    assert SaliencyMask.from_dict({"b": torch.zeros(0, dtype=torch.bool)}).density == 0.0


def test_equality() -> None:
    mask = SaliencyMask.from_dict(masks(), {"seed": "1"})
    assert mask == SaliencyMask.from_dict(masks(), {"seed": "2"}), "the same weights, whatever is said about them"
    assert mask != 1
    for name, m in masks().items():
        if m.numel():
            changed = masks()
            changed[name].view(-1)[-1] ^= True
            assert SaliencyMask.from_dict(changed) != mask, name
    fewer = masks()
    del fewer["a.scale"]
    assert SaliencyMask.from_dict(fewer) != mask and mask != SaliencyMask.from_dict(fewer)
    reshaped = masks()
    reshaped["head"] = reshaped["head"].reshape(5, 33)
    assert SaliencyMask.from_dict(reshaped) != mask


@pytest.mark.parametrize("prefix", ("module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."))
def test_wrappers_prefixes_are_stripped(prefix: str) -> None:
    plain, wrapped = (SaliencyMask.from_dict({p + n: m for n, m in masks().items()}) for p in ("", prefix))
    assert wrapped.names == list(masks()) and wrapped == plain
    bound = plain.bind(parameters_of(masks(), prefix))
    assert all(torch.equal(a, b) for a, b in zip(bound, ops.pack_bits(list(masks().values())), strict=True))


def test_a_models_own_part_called_module_keeps_its_name() -> None:
    yes = torch.tensor(True)
    assert SaliencyMask.from_dict({"block.module.w": yes}).names == ["block.module.w"]
    assert SaliencyMask.from_dict({"module.w": yes, "w": yes}).names == ["module.w", "w"]


def test_blocks_that_are_compiled_have_plain_names() -> None:
    yes = torch.tensor(True)
    assert SaliencyMask.from_dict({"0._orig_mod.w": yes, "my_orig_mod.w": yes}).names == ["0.w", "my_orig_mod.w"]
    with pytest.raises(InputError, match="two parameters are called w"):
        SaliencyMask.from_dict({"_orig_mod.w": yes, "w": yes})


def test_a_file_with_a_wrappers_prefix_loads(tmp_path) -> None:
    plain = SaliencyMask.from_dict(masks())
    bits = {f"module.{name}": word for name, word in plain._bits.items()}
    SaliencyMask(bits, {f"module.{n}": s for n, s in plain.shapes.items()}).save(tmp_path / "mask.safetensors")
    assert SaliencyMask.load(tmp_path / "mask.safetensors") == plain


@pytest.mark.parametrize(
    "given_masks, message",
    [
        ({}, "a mask of no tensors"),
        ({"w": torch.ones(3)}, r"mask of w: expected a dense torch.bool tensor, got a torch.f.*; convert it with != 0"),
        ({"w": torch.ones(3, dtype=torch.uint8)}, "got a torch.uint8"),
        ({"w": [True, False]}, "got a list"),
    ],
)
def test_what_is_no_mask_is_refused(given_masks: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SaliencyMask.from_dict(given_masks)


# --- Binding ------------------------------------------------------------------------------------------------


def test_bits_are_bound_in_the_parameters_order() -> None:
    mask = SaliencyMask.from_dict(masks())
    backwards = dict(reversed(masks().items()))
    bound = mask.bind(parameters_of(backwards))
    assert all(torch.equal(a, b) for a, b in zip(bound, ops.pack_bits(list(backwards.values())), strict=True))


def test_frozen_parameters_need_no_bits() -> None:
    mask = SaliencyMask.from_dict(masks())
    frozen = torch.nn.Parameter(torch.ones(5, 7), requires_grad=False)
    bound = mask.bind([("frozen", frozen), *parameters_of(masks())])
    assert torch.equal(bound[0], torch.zeros(2, dtype=torch.int32))
    for bits, own in zip(bound[1:], mask.bind(parameters_of(masks())), strict=True):
        assert torch.equal(bits, own)
    frozen.requires_grad_(True)
    with pytest.raises(InputError, match="has no bits for frozen"):
        mask.bind([("frozen", frozen), *parameters_of(masks())])


def test_bits_are_bound_in_memory_order() -> None:
    keep = coin(torch.Generator().manual_seed(0), (6, 5, 3, 3))
    mask = SaliencyMask.from_dict({"w": keep, "v": keep[0, 0]})
    weights = {"w": torch.zeros(6, 5, 3, 3).to(memory_format=torch.channels_last), "v": torch.zeros(3, 3).t()}
    bound = mask.bind(weights.items())
    assert torch.equal(bound[0], ops.pack_bits([keep.to(memory_format=torch.channels_last)])[0])
    assert torch.equal(bound[1], ops.pack_bits([keep[0, 0].t().contiguous().t()])[0])
    assert not torch.equal(bound[0], mask.bind([("w", torch.zeros(6, 5, 3, 3)), ("v", torch.zeros(3, 3))])[0])
    # A mask that lay in memory as its weight did is the same mask.
    assert SaliencyMask.from_dict({"w": keep.to(memory_format=torch.channels_last), "v": keep[0, 0]}) == mask


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p[1:], r"the mask has bits for, and the model does not train, stem\.weight: use the mask made"),
        (lambda p: p[2:], r"has bits for, and the model does not train, stem\.weight and 1 more"),
        (lambda p: [*p, ("new", torch.ones(2))], "the mask has no bits for new: use the mask made for this model"),
        (
            lambda p: [("head", torch.ones(5, 33)) if n == "head" else (n, t) for n, t in p],
            r"the mask of head has shape \[33, 5\] and the parameter \[5, 33\]",
        ),
        (lambda p: [("a.scale", torch.ones(1)) if n == "a.scale" else (n, t) for n, t in p], r"shape \[\] and"),
    ],
)
def test_a_mask_of_another_model_is_refused(change: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SaliencyMask.from_dict(masks()).bind(change(parameters_of(masks())))


# --- Fractions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fraction, total, kept",
    [
        (0.5, 10, 5),
        (0.5, 11, 5),
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996
        (0.57, 100, 57),
        (1 / 3, 3, 1),  # the float is less than a third
        (2 / 3, 3, 2),
        (0.1, 30, 3),  # 0.1 * 3 is more than 0.3: the other direction
        (0.3, 10, 3),
        (0.1 + 0.2, 10, 3),
        (0.3333, 3, 0),
        (0.0, 7, 0),
        (1.0, 7, 7),
        (1, 7, 7),
        (0.999999, 7, 6),
    ],
)
def test_a_fraction_is_exact(fraction: float, total: int, kept: int) -> None:
    rng = torch.Generator().manual_seed(1)
    scores = {"a": normal(rng, (total // 2,)), "b": normal(rng, (total - total // 2,))}
    mask = SaliencyMask.top_fraction(scores, fraction, {"seed": "3"})
    assert mask.kept == kept and mask.total == total
    assert mask.metadata == {"mask_fraction": repr(float(fraction)), "seed": "3"}


@given(total=st.integers(1, 10**10), data=st.data())
def test_every_part_of_a_total_can_be_asked_for(total: int, data: st.DataObject) -> None:
    part = data.draw(st.integers(0, total))
    assert _part_of(total, part / total) == part
    fraction = data.draw(st.floats(0, 1))
    assert abs(_part_of(total, fraction) - fraction * total) <= 1


def test_top_fraction_keeps_the_largest_over_all_tensors() -> None:
    rng = torch.Generator().manual_seed(1)
    scores = {f"module.{name}": normal(rng, m.shape, torch.float32) for name, m in masks().items()}
    other = {name: normal(rng, score.shape) for name, score in reversed(scores.items())}
    for kind, of in (
        ("value", lambda name: scores[name]),
        ("magnitude", lambda name: scores[name].abs()),
        ("product", lambda name: (scores[name].double() * other[name]).abs()),
    ):
        options = {"score": kind, "other": other if kind == "product" else None}
        mask = SaliencyMask.top_fraction(scores, 0.25, **options)
        assert mask.names == list(masks()) and mask.shapes == {name: tuple(m.shape) for name, m in masks().items()}
        flat = torch.cat([of(name).flatten() for name in scores])
        cut = flat.sort(descending=True).values[mask.kept - 1]
        assert mask.kept == flat.numel() // 4
        assert_equal(mask.unpack(), {name: of(f"module.{name}") >= cut for name in masks()})


def test_ties_of_a_fraction_are_broken_in_logical_order() -> None:
    scores = {"a": torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last), "b": torch.zeros(3, 4).t()}
    mask = SaliencyMask.top_fraction(scores, 0.75).unpack()
    assert mask["a"].all() and mask["b"].flatten().tolist() == [True] * 3 + [False] * 9
    mask = SaliencyMask.top_fraction(scores, 0.5).unpack()
    assert mask["a"].flatten().tolist() == [True] * 18 + [False] * 6 and not mask["b"].any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (({}, 0.5), "scores of no tensors were given"),
        (
            ({"w": torch.ones(3, dtype=torch.int64)}, 0.5),
            "score of w: expected a dense tensor of a floating dtype, got a torch",
        ),
        (({"w": [1.0]}, 0.5), "floating dtype, got a list"),
        (({"w": torch.ones(3)}, 50), "fraction: expected a number from 0 to 1, got 50"),
        (({"w": torch.ones(3)}, -0.1), "fraction: .*got -0.1"),
        (({"w": torch.ones(3)}, math.nan), "fraction: .*got nan"),
        (({"w": torch.ones(3)}, "0.5"), "fraction: .*got '0.5'"),
    ],
)
def test_bad_fractions(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SaliencyMask.top_fraction(*arguments)


def test_bad_second_numbers() -> None:
    scores, ones = {"w": torch.ones(3)}, {"w": torch.ones(3)}
    for options, message in (
        ({"score": "rank"}, "score: expected one of value, .*got 'rank'"),
        ({"score": "product"}, "expected other to have the names of scores"),
        ({"other": ones}, "expected other to have the names"),
        ({"score": "ratio", "other": {"v": torch.ones(3)}}, "expected other to have the names"),
        ({"score": "ratio", "other": {"w": torch.ones(4)}}, r"other of w has shape \[4\] and its score \[3\]"),
    ):
        with pytest.raises(InputError, match=message):
            SaliencyMask.top_fraction(scores, 0.5, **options)
