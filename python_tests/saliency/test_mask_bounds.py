"""Headers and pickles of masks that say what cannot be: the project's own error, before memory is taken."""

from __future__ import annotations

import copy
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unlearn_ext.errors import InputError
from unlearn_ext.evaluation import inception
from unlearn_ext.models import variants
from unlearn_ext.saliency import SaliencyMask

HEADER = {
    "__metadata__": {"format": "unlearn_ext.saliency_mask.1", "shapes": '{"a": [3, 5]}'},
    "a": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]},
}


def write(path: Path, header: dict[str, Any], body: bytes = b"\x05\0\0\0") -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def with_shape(shape: str) -> dict[str, Any]:
    return {**HEADER, "__metadata__": {**HEADER["__metadata__"], "shapes": f'{{"a": {shape}}}'}}


def test_the_header_is_that_of_a_mask(tmp_path: Path) -> None:
    write(tmp_path / "mask.safetensors", HEADER)
    mask = SaliencyMask.load(tmp_path / "mask.safetensors")
    assert mask.shapes == {"a": (3, 5)} and mask.kept == 2


SHAPES = ("[-1]", "[-3, -5]", "[1e3]", "[3.0, 5]", '["3", 5]', "[true]", "[null]", "[[3], 5]", '"35"', "null", "5")
SHAPES += ('{"3": 5}', "[99999999999999999999]", "[0, 4611686018427387904, 8]", "[4294967296, 4294967296]")
SHAPES += ("[0, 3]", "[33]", "[9223372036854775807]", "[" * 100_000 + "]" * 100_000, "[" + "9" * 5000 + "]")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape[:24])
def test_shapes_that_are_no_shapes(shape: str, tmp_path: Path) -> None:
    write(tmp_path / "mask.safetensors", with_shape(shape))
    with pytest.raises(InputError, match=r"is damaged: (its shapes cannot be read|the bits of a do not fit)"):
        SaliencyMask.load(tmp_path / "mask.safetensors")


@pytest.mark.parametrize(
    "dtype, shape, size",
    [
        *[("F4", [8], 4), ("F4", [1], 4), ("F6_E2M3", [4], 3), ("F8_E8M0", [4], 4), ("U16", [2], 4), ("C64", [1], 8)],
        *[("I32", [0], 0), ("F4", [0], 0), ("I32", [0, 2**62], 0), ("I32", [], 4), ("BOOL", [4], 4), ("I64", [1], 8)],
    ],
    ids=str,
)
def test_slices_of_other_types(dtype: str, shape: list[int], size: int, tmp_path: Path) -> None:
    header = {**HEADER, "a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    write(tmp_path / "mask.safetensors", header, bytes(size))
    with pytest.raises(InputError, match="safetensors is"):
        SaliencyMask.load(tmp_path / "mask.safetensors")


def nested(depth: int) -> bytes:
    """A pickle of lists in lists, written by hand: Python's own pickler gives up first."""
    return b"\x80\x02" + b"}X\x01\0\0\0a" + b"]" * depth + b"a" * (depth - 1) + b"s."


def save(value: Any) -> Callable[[Path], None]:
    return lambda path: torch.save({"a": value}, path)


PICKLES: dict[str, Callable[[Path], None]] = {
    "expanded": save(torch.ones(1, dtype=torch.bool).expand(2**17, 2**17)),
    "expanded numbers": save(torch.ones(1).expand(2**34)),
    "many names for one": lambda path: torch.save(dict.fromkeys(map(str, range(500)), torch.ones(100_000)), path),
    "complex": save(torch.ones(2, dtype=torch.complex64)),
    "eight bits": save(torch.ones(2).to(torch.float8_e5m2)),
    "unsigned": save(torch.ones(2).to(torch.uint16)),
    "meta": save(torch.ones(2**40, device="meta")),
    "huge integer": save(10**5000),
    "deep": lambda path: path.write_bytes(nested(100_000)),
}


@pytest.mark.parametrize("damage", PICKLES.values(), ids=PICKLES.keys())
def test_pickles_that_say_what_cannot_be(damage: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "mask.pt"
    damage(path)
    for read in (lambda: SaliencyMask.from_pt(path), lambda: SaliencyMask.from_fisher_pt(path, path)):
        with pytest.raises(InputError) as caught:
            read()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def rewritten(path: Path, member: str, size: int, compression: int) -> None:
    """A file of ``torch.save``, one member of which grew by ``size`` zeros: a pickle ends at its STOP."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            grown = name.endswith(member)
            archive.writestr(name, content + bytes(size * grown), compression if grown else zipfile.ZIP_STORED)


@pytest.mark.parametrize("member", ("data.pkl", "byteorder", "data/0"))
@pytest.mark.parametrize("compression", (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2), ids=("deflated", "bzip2"))
def test_what_grows_when_it_is_read_is_not_read(member: str, compression: int, tmp_path: Path, monkeypatch) -> None:
    """3 MB of deflated zeros were 3 GB of memory, and a valid mask."""
    masks, weights, model = tmp_path / "mask.pt", tmp_path / "weights.pth", tmp_path / "pytorch_model.bin"
    for path in (masks, weights, model):
        torch.save({"a": torch.ones(3, dtype=torch.bool)}, path)
        rewritten(path, member, 1 << 20, compression)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    readers = (
        lambda: SaliencyMask.from_pt(masks),
        lambda: inception._check_tensors(weights),
        lambda: variants.find_weights(tmp_path, "text encoder", variants.TRANSFORMERS),
    )
    for path, read in zip((masks, weights, model), readers, strict=True):
        with pytest.raises(InputError, match=rf"{path.name} is not as torch\.save writes archives \(compressed"):
            read()


def test_archives_whose_members_overlap_or_begin_later_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1000, dtype=torch.bool)}, path := tmp_path / "mask.pt")
    assert SaliencyMask.from_pt(path).kept == 1000  # as it was saved
    whole = path.read_bytes()
    with zipfile.ZipFile(path, "a") as archive:  # ten more entries of the directory for the same bytes
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        for number in range(10):
            again = copy.copy(largest)
            again.filename = f"mask/data/{number + 1}"
            archive.filelist.append(again)
        archive._didModify = True
    later = tmp_path / "later.pt"
    later.write_bytes(b"PK\x03\x04" + whole)
    for damaged in (path, later):
        with pytest.raises(InputError, match=r"is not as torch\.save writes|is damaged"):
            SaliencyMask.from_pt(damaged)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", (torch.strided, torch.jagged), ids=str)
def test_nested_tensors_are_refused(layout: torch.layout, tmp_path: Path) -> None:
    torch.save({"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)}, tmp_path / "mask.pt")
    with pytest.raises(InputError, match="a is a tensor of layout"):
        SaliencyMask.from_pt(tmp_path / "mask.pt")


def test_what_shares_a_little_memory_is_read(tmp_path: Path) -> None:
    tied = torch.tensor([1, 0, 1])
    small = torch.ones(1, dtype=torch.bool).expand(4, 5)
    torch.save({"a": tied, "b": tied, "c": small}, tmp_path / "mask.pt")
    mask = SaliencyMask.from_pt(tmp_path / "mask.pt")
    assert mask.kept == 24 and mask.shapes["c"] == (4, 5)
