"""Masks in files: our own, damaged ones, and those of other projects."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.masks import assert_equal, masks, trained
from helpers.models import WithUnused, batches
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unlearn_ext.errors import InputError
from unlearn_ext.saliency import FisherDiagonal, SaliencyMask
from unlearn_ext.tasks import Classification

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


def many_dimensions(bits: dict[str, Tensor], header: dict[str, str]) -> None:
    bits["head"] = torch.ones(1, dtype=torch.int32)
    header["shapes"] = json.dumps({**json.loads(header["shapes"]), "head": [1] * 65})


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
    "65 dimensions": lambda path: rewritten(path, many_dimensions),
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
    assert "unused" in mask.names and not mask.unpack()["unused"].any()


FOREIGN_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda path: path.write_text("no pickle at all"), "cannot be read as tensors alone"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as tensors alone"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged"),
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
    "dimensions": (lambda path: torch.save({"w": torch.ones([1] * 65)}, path), "w has 65 dimensions, and at most 64"),
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
