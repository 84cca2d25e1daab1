"""Masks by name and their files, Fisher diagonals against plain PyTorch, hashes of protected weights."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DTYPES, coin, normal
from hypothesis import given
from hypothesis import strategies as st
from models import ConvNet, WithUnused, batches, make
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from unlearn_ext import _arriving, ops
from unlearn_ext.errors import InputError, NonFiniteError
from unlearn_ext.saliency import FisherDiagonal, SaliencyMask, _parts
from unlearn_ext.saliency import fisher as fisher_module
from unlearn_ext.saliency.mask import _on_host, _part_of
from unlearn_ext.saliency.protection import protected_count, protected_hashes
from unlearn_ext.tasks import Classification


def masks() -> dict[str, Tensor]:
    """In a model's order, which is neither that of the alphabet nor of sizes."""
    rng = torch.Generator().manual_seed(5)
    shapes = {"stem.weight": (6, 2, 3, 3), "stem.bias": (6,), "a.scale": (), "empty": (0, 4), "head": (33, 5)}
    return {name: coin(rng, shape, 0.3) for name, shape in shapes.items()}


def parameters_of(tensors: dict[str, Tensor], prefix: str = "") -> list[tuple[str, Tensor]]:
    return [(prefix + name, torch.zeros(tensor.shape)) for name, tensor in tensors.items()]


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype == torch.bool
        assert a[name].shape == b[name].shape and torch.equal(a[name], b[name]), name


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


def test_densities() -> None:
    mask = SaliencyMask.from_dict(
        {"a": torch.tensor([True, False, False, True]), "b": torch.zeros(0, dtype=torch.bool), "c": torch.tensor(True)}
    )
    assert mask.densities == {"a": 0.5, "b": 0.0, "c": 1.0}
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
        ({"w": torch.ones(3)}, r"mask of w: expected a torch.bool tensor, got torch.float32; convert it with != 0"),
        ({"w": torch.ones(3, dtype=torch.uint8)}, "got torch.uint8"),
        ({"w": [True, False]}, "got list"),
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


# --- Files --------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    metadata = {"weights_hash": "0123", "forget_hash": "4567", "seed": "3", "note": "häßlich, 中文"}
    mask = SaliencyMask.from_dict(masks(), metadata)
    mask.save(tmp_path / "mask.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["mask.safetensors"]
    loaded = SaliencyMask.load(tmp_path / "mask.safetensors")
    assert loaded == mask and loaded.names == mask.names
    assert loaded.metadata == metadata
    assert_equal(loaded.unpack(), masks())
    SaliencyMask.from_dict({"w": torch.tensor(True)}).save(tmp_path / "mask.safetensors")
    assert SaliencyMask.load(str(tmp_path / "mask.safetensors")).names == ["w"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "mine"}, "metadata: 'format' is what a file of a mask says for itself; choose another name"),
        ({"shapes": "[]"}, "metadata: 'shapes' is what"),
    ],
    ids=str,
)
def test_metadata_that_a_file_holds_itself(metadata: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        SaliencyMask.from_dict(masks(), metadata)
    mask = SaliencyMask.from_dict(masks())
    mask.metadata.update(metadata)
    with pytest.raises(InputError, match=f"^{message}"):
        mask.save(tmp_path / "mask.safetensors")
    assert not list(tmp_path.iterdir())


def test_metadata_added_later_are_kept_as_text(tmp_path: Path) -> None:
    mask = SaliencyMask.from_dict(masks(), {"seed": 3})
    assert mask.metadata == {"seed": "3"}
    mask.metadata.update(epoch=2)
    mask.save(tmp_path / "mask.safetensors")
    assert SaliencyMask.load(tmp_path / "mask.safetensors").metadata == {"seed": "3", "epoch": "2"}


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    """A valid safetensors file with other contents."""
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
        bits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(bits, header)
    save_file(bits, path, metadata=header)


def without(header: dict[str, str], name: str) -> str:
    return json.dumps({n: shape for n, shape in json.loads(header["shapes"]).items() if n != name})


# Each is a file that something else wrote, or that was cut or edited.
DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "short": lambda path: path.write_bytes(b"\x10"),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a mask at all, but a longer text"),
    "other file": lambda path: save_file({"w": torch.ones(3)}, path),
    "other format": lambda path: rewritten(path, lambda bits, header: header.update(format="pt")),
    "other dtype": lambda path: rewritten(path, lambda bits, header: bits.update(head=bits["head"].float())),
    "too few words": lambda path: rewritten(path, lambda bits, header: bits.update(head=bits["head"][1:].clone())),
    "tensor missing": lambda path: rewritten(path, lambda bits, header: bits.pop("head")),
    "shape missing": lambda path: rewritten(path, lambda bits, header: header.update(shapes=without(header, "head"))),
    "no shapes": lambda path: rewritten(path, lambda bits, header: header.pop("shapes")),
    "shapes not JSON": lambda path: rewritten(path, lambda bits, header: header.update(shapes="{")),
    "tail bits": lambda path: rewritten(path, lambda bits, header: bits["stem.bias"].fill_(-1)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_and_foreign_files(damage: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    SaliencyMask.from_dict(masks()).save(path)
    damage(path)
    with pytest.raises(InputError, match=r"mask\.safetensors") as caught:
        SaliencyMask.load(path)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError, match=f"^there is no mask at {path}$"):
            SaliencyMask.load(path)


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
            "score of w: expected a tensor of a floating dtype, got torch",
        ),
        (({"w": [1.0]}, 0.5), "floating dtype, got list"),
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


# --- Files of other projects --------------------------------------------------------------------------------


class Argument:
    """Stands for the argparse namespaces that checkpoints often hold."""


def test_masks_of_salun_and_sfron(tmp_path: Path) -> None:
    path = tmp_path / "with_0.5.pt"
    mask = SaliencyMask.from_dict(masks())
    for form in (torch.int64, torch.bool, torch.float32, torch.uint8):
        for prefix in ("", "module."):
            for zipped in (True, False):
                tensors = {prefix + name: m.to(form) for name, m in masks().items()}
                torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
                read = SaliencyMask.from_pt(path, metadata={"by": "SalUn"})
                assert read == mask and read.names == mask.names and read.metadata == {"by": "SalUn"}


def test_a_mask_written_for_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "mask.pt"
    SaliencyMask.from_dict(masks()).to_pt(path)
    assert [p.name for p in path.parent.iterdir()] == ["mask.pt"]
    found = torch.load(path, weights_only=True)
    assert type(found) is dict
    assert_equal(found, masks())
    assert SaliencyMask.from_pt(str(path)) == SaliencyMask.from_dict(masks())


def test_a_plain_zero_stands_for_a_parameter_without_gradient(tmp_path: Path) -> None:
    """As SFR-on's released code leaves it in masks and Fisher files, for frozen parameters as well."""
    keep = torch.tensor([True, False, True])
    torch.save({"w": keep, "unused": 0, "frozen": 0}, tmp_path / "mask.pt")
    model = {"w": torch.ones(3), "unused": torch.ones(2, 2), "frozen": torch.ones(5)}
    named = [(f"module.{name}", nn.Parameter(p, requires_grad=name != "frozen")) for name, p in model.items()]
    assert SaliencyMask.from_pt(tmp_path / "mask.pt").names == ["w"]
    found = SaliencyMask.from_pt(tmp_path / "mask.pt", named).unpack()
    assert_equal(found, {"w": keep, "unused": torch.zeros(2, 2, dtype=torch.bool)})

    f, r = (
        {"w": torch.tensor([3.0, 1.0, 0.0]), "unused": 0, "one": 0},
        {"w": torch.tensor([1.0, 2.0, 0.0]), "unused": 0},
    )
    files = tmp_path / "forget_fisher.pt", tmp_path / "remain_fisher.pt"
    torch.save({**f, "frozen": 0}, files[0])
    torch.save({**r, "one": torch.ones(2), "frozen": 0.0}, files[1])
    for options, kept in (({}, [True, False, True]), ({"mask_fraction": 0.2}, [True, False, False])):
        mask = SaliencyMask.from_fisher_pt(*files, **options)
        assert mask.names == ["w", "one"] and mask.shapes == {"w": (3,), "one": (2,)}
        mask = SaliencyMask.from_fisher_pt(*files, named, **options).unpack()
        expected = {"w": kept, "unused": [[False] * 2] * 2, "one": [False] * 2}
        assert {name: m.tolist() for name, m in mask.items()} == expected


@pytest.mark.parametrize("options", [{}, {"gamma": 3.0}, {"mask_fraction": 0.4}, {"gamma": 0.5, "eps": 1e-3}])
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_fisher_files_give_the_mask_of_the_diagonals(dtype: torch.dtype, options: dict, tmp_path: Path) -> None:
    model = trained(model=WithUnused)
    fishers = [
        FisherDiagonal(model, Classification()).measure(batches(2, 4, seed=s, dtype=torch.float64)) for s in (1, 2)
    ]
    means = [{name: mean.to(dtype) for name, mean in fisher.means().items()} for fisher in fishers]
    for name, mean in zip(("f.pt", "r.pt"), means, strict=True):
        torch.save(mean, tmp_path / name)
    for fisher, mean in zip(fishers, means, strict=True):  # what the files hold after rounding
        fisher.sums = {name: m if dtype == torch.float64 else m.float() for name, m in mean.items()}
        fisher.count = 1
    expected = SaliencyMask.from_fisher(*fishers, **options)
    mask = SaliencyMask.from_fisher_pt(tmp_path / "f.pt", tmp_path / "r.pt", **options, metadata={"seed": "1"})
    assert mask == expected and mask.metadata == {**expected.metadata, "seed": "1"}
    assert "unused" in mask.names and mask.densities["unused"] == 0.0


FOREIGN_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda path: path.write_text("no pickle at all"), "cannot be read as tensors alone"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as tensors alone"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read as tensors alone"),
    "own format": (lambda path: SaliencyMask.from_dict(masks()).save(path), "cannot be read as tensors alone"),
    "code": (lambda path: torch.save({"w": torch.ones(2), "args": Argument()}, path), "reading would run code"),
    "list": (lambda path: torch.save([torch.ones(2)], path), "no dictionary .*got of type list"),
    "tensor": (lambda path: torch.save(torch.ones(2), path), "no dictionary .*got a tensor"),
    "other keys": (lambda path: torch.save({1: torch.ones(2)}, path), "no dictionary .*other keys"),
    "nested": (lambda path: torch.save({"state": {"w": torch.ones(2)}}, path), "no dictionary .*state is a dictionary"),
    "text value": (lambda path: torch.save({"w": torch.ones(2), "v": "x"}, path), "v is of type str"),
    "plain one": (lambda path: torch.save({"w": torch.ones(2), "v": 1}, path), "v is of type int"),
    "sparse": (lambda path: torch.save({"w": torch.ones(2).to_sparse()}, path), "w is a tensor of layout"),
    "two names": (lambda path: torch.save({"w": torch.ones(2), "_orig_mod.w": torch.ones(2)}, path), "two parameters"),
    "nothing": (lambda path: torch.save({}, path), "holds no tensor"),
    "zeros alone": (lambda path: torch.save({"w": 0}, path), "holds no tensor"),
}


@pytest.mark.parametrize("damage, message", FOREIGN_DAMAGES.values(), ids=FOREIGN_DAMAGES.keys())
def test_files_that_hold_something_else(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    path, good = tmp_path / "foreign.pt", tmp_path / "good.pt"
    torch.save({"w": torch.ones(2)}, path)
    torch.save({"w": torch.ones(2)}, good)
    damage(path)
    for read in (
        lambda: SaliencyMask.from_pt(path),
        lambda: SaliencyMask.from_fisher_pt(path, good),
        lambda: SaliencyMask.from_fisher_pt(good, path),
    ):
        with pytest.raises(InputError, match=message) as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", ([0, 2], [-1, 1], [0.0, 0.5], [1.0, math.nan], [0, 255]))
def test_masks_hold_zero_and_one(values: list, tmp_path: Path) -> None:
    torch.save({"v": torch.ones(2), "w": torch.tensor(values)}, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"m\.pt is no mask: w holds other values than 0 and 1"):
        SaliencyMask.from_pt(tmp_path / "m.pt")


def test_fisher_files_that_do_not_fit(tmp_path: Path) -> None:
    good, other = tmp_path / "good.pt", tmp_path / "other.pt"
    torch.save({"w": torch.ones(2)}, good)
    for tensors, message in (
        ({"v": torch.ones(2)}, "hold different parameters"),
        ({"w": torch.ones(3)}, r"w has shape \[2\] in .*good.pt and \[3\] in .*other.pt"),
        ({"w": torch.ones(2, dtype=torch.int64)}, "other.pt is no Fisher diagonal: w is of torch.int64"),
        ({"w": torch.tensor([1.0, -1.0])}, "no Fisher diagonal: w holds numbers that are negative or not finite"),
        ({"w": torch.tensor([1.0, math.nan])}, "negative or not finite"),
        ({"w": torch.tensor([1.0, math.inf])}, "negative or not finite"),
    ):
        torch.save(tensors, other)
        with pytest.raises(InputError, match=message):
            SaliencyMask.from_fisher_pt(good, other)
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError, match=f"^there is no file at {path}$"):
            SaliencyMask.from_pt(path)


# --- Fisher -------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    functional.cross_entropy(model(inputs), labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_fisher(model: nn.Module, data: list, per_sample: bool = False) -> dict[str, Tensor]:
    model = copy.deepcopy(model).eval()
    parts = [(x[i : i + 1], y[i : i + 1]) for x, y in data for i in range(len(y))] if per_sample else data
    squares = [{name: g**2 for name, g in gradients(model, *part).items()} for part in parts]
    return {name: sum(s[name] for s in squares) / len(squares) for name in squares[0]}


def trained(dtype: torch.dtype = torch.float64, model: type[nn.Module] = ConvNet) -> nn.Module:
    """With running statistics that differ from a batch's."""
    own = make(model).to(dtype)
    with torch.no_grad():
        for x, _ in batches(4, 8, seed=9, dtype=dtype):
            own(x * 2 + 1)
    return own


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
    monkeypatch.setattr(_arriving, "_WAITING", {"cpu": 1})
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


# --- Protection ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hash_sees_every_bit_of_protected_weights(dtype: torch.dtype, channels_last: bool) -> None:
    rng = torch.Generator().manual_seed(3)
    weights = [normal(rng, (2, 3, 2, 2), dtype), normal(rng, (), dtype), torch.zeros(0, dtype=dtype)]
    if channels_last:
        weights[0] = weights[0].to(memory_format=torch.channels_last)
    keep = [coin(rng, weights[0].shape), torch.tensor(False), torch.zeros(0, dtype=torch.bool)]
    laid_out = [torch.empty_like(w, dtype=torch.bool).copy_(k) for w, k in zip(weights, keep, strict=True)]
    bits = ops.pack_bits(laid_out)
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[weights[0].element_size()]
    before = protected_hashes(weights, bits)
    assert protected_count(weights, bits) == int((~keep[0]).sum()) + 1
    for place in range(weights[0].numel()):
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), weights[0].shape))
        word = weights[0].view(integer)
        for bit in range(8 * weights[0].element_size()):
            flip = torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).to(integer)
            word[index] ^= flip
            after = protected_hashes(weights, bits)
            word[index] ^= flip
            assert (after[0] == before[0]) == bool(keep[0][index]), (index, bit)
            assert after[1:] == before[1:]
    weights[1].view(integer).bitwise_xor_(1)
    assert protected_hashes(weights, bits)[1] != before[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_changes_of_two_weights_do_not_cancel(dtype: torch.dtype) -> None:
    weight = normal(torch.Generator().manual_seed(3), (12,), dtype)
    bits = ops.pack_bits([torch.zeros(12, dtype=torch.bool)])
    before = protected_hashes([weight], bits)
    for change in (lambda w: -w, lambda w: 2 * w, lambda w: torch.nextafter(w, 2 * w) if dtype.itemsize > 2 else w / 2):
        for a in range(12):
            for b in range(a):
                other = weight.clone()
                other[[a, b]] = change(weight[[a, b]])
                assert not torch.equal(other, weight) and protected_hashes([other], bits) != before, (a, b)


def test_a_hash_knows_places() -> None:
    """Exchanged weights, and those moved into the next piece of a large tensor."""
    weight = torch.arange((1 << 22) + 3, dtype=torch.float32)
    bits = ops.pack_bits([torch.zeros(weight.shape, dtype=torch.bool)])
    before = protected_hashes([weight], bits)
    for a, b in ((0, 1), (5, 1 << 22), ((1 << 22) - 1, (1 << 22) + 2)):
        other = weight.clone()
        other[[a, b]] = weight[[b, a]]
        assert protected_hashes([other], bits) != before
    assert protected_hashes([weight.clone()], bits) == before


def test_a_hash_does_not_depend_on_layout_or_threads() -> None:
    rng = torch.Generator().manual_seed(3)
    weight, keep = normal(rng, (40, 30, 3, 3), torch.float32), coin(rng, (40, 30, 3, 3))
    results = set()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for form in (torch.contiguous_format, torch.channels_last):
                bits = ops.pack_bits([keep.to(memory_format=form)])
                results.add(tuple(protected_hashes([weight.to(memory_format=form)], bits)))
    finally:
        torch.set_num_threads(threads)
    assert len(results) == 1
