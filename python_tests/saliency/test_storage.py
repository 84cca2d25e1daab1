"""Where the forget Fisher waits: the same mask to the bit, and nothing left of it."""

from __future__ import annotations

import gc
import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from helpers.layouts import same_bits
from helpers.models import WithUnused, batches, make
from safetensors.torch import load_file
from torch import Tensor

from unlearn_ext import FisherDiagonal, InputError, SaliencyMask, Unlearner
from unlearn_ext.jobs.trial import _LiveBytes
from unlearn_ext.methods import SFRon
from unlearn_ext.run import loop
from unlearn_ext.saliency import storage as storage_module
from unlearn_ext.saliency.storage import StoredSums, stored
from unlearn_ext.tasks import Classification
from unlearn_ext.utils.leftovers import sweep

DATA = {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}


def method(**changes) -> SFRon:
    return SFRon(**{"rule": "momentum", "lr": 0.02, "momentum": 0.9, "iterations": 3, "gamma": 0.8, **changes})


def sums() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.rand(5, 3, generator=rng),
        "a.bias": torch.rand(7, generator=rng).double(),
        "scale": torch.rand((), generator=rng),
        "columns": torch.rand(3, 4, generator=rng).t(),
        "empty": torch.zeros(0, 4),
        "channels_last": torch.rand(2, 3, 4, 5, generator=rng).to(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_each_comes_back_as_it_was(where: str, tmp_path: Path) -> None:
    given, expected = sums(), sums()
    with stored(given, where, tmp_path) as found:
        assert list(found) == list(expected) and len(found) == len(expected)
        for name in reversed(expected):
            back = found[name]
            assert same_bits(back.contiguous(), expected[name].contiguous())
            assert back.dtype == expected[name].dtype and back.shape == expected[name].shape
        if where == "disk":  # by its own reader
            (path,) = tmp_path.iterdir()
            others = load_file(path)
            assert all(torch.equal(others[name], t) for name, t in expected.items()) and len(others) == len(expected)
    assert not list(tmp_path.iterdir())
    assert (not given) == (where != "device")


def test_only_one_tensor_is_alive_at_a_time(tmp_path: Path) -> None:
    """Of ten that wait on disk, while they are written and while they are read."""
    given = {f"w{i}": torch.ones(1000) for i in range(10)}
    watch = _LiveBytes(torch.device("cpu"), given.values())
    with watch, stored(given, "disk", tmp_path) as found:
        assert not given
        for name in found:
            found[name] + 1
    assert watch.peak <= 2 * 4000  # one, and the sum


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("in_backward", (False, True))
@pytest.mark.parametrize("where", ["host", "disk"])
def test_the_mask_and_the_run_are_the_ordinary_ones(where: str, in_backward: bool, layout, tmp_path: Path) -> None:
    def run(**options):
        model = make(WithUnused).to(memory_format=layout)
        unlearner = Unlearner(model, Classification(), method(), optimizer_in_backward=in_backward, **options)
        return unlearner.run(**DATA, output_dir=tmp_path), model.state_dict()

    (ordinary, weights), (other, others) = run(), run(fisher_storage=where)
    assert other.mask == ordinary.mask and other.mask.metadata == ordinary.mask.metadata
    assert list(other.mask.names) == list(ordinary.mask.names) and 0.1 < ordinary.mask.density < 0.9
    assert all(same_bits(weights[name], others[name]) for name in weights)
    assert {path.name for path in tmp_path.iterdir()} == {"history.jsonl", "history-1.jsonl"}
    f, r = (FisherDiagonal(make(WithUnused), Classification()).measure(DATA[name]) for name in ("forget", "retain"))
    for name, keep in ordinary.mask.unpack().items():  # by hand, in float64
        ratio = (f.sums[name].double() / 3 + 1e-15) / (r.sums[name].double() / 5 + 1e-15)
        near = (ratio / 0.8 - 1).abs() < 1e-5
        assert name == "unused" or torch.equal(keep | near, (ratio >= 0.8) | near)
        assert name != "unused" or not keep.any()


@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_nothing_of_the_fisher_is_left_when_the_iterations_begin(where: str, tmp_path: Path, monkeypatch) -> None:
    seen, alive = [], []
    make_mask = SaliencyMask.from_fisher.__func__

    def from_fisher(cls, forget, retain, **options):
        held = list(retain.sums.values()) + ([] if isinstance(forget.sums, StoredSums) else list(forget.sums.values()))
        if where == "host":
            held += list(forget.sums._fetch.__self__.values())
        seen.extend(weakref.ref(t.untyped_storage()) for t in held)
        del held
        return make_mask(cls, forget, retain, **options)

    def start(self, checkpoint):
        alive.append(sum(reference() is not None for reference in seen))
        assert not list(tmp_path.glob("*fisher*"))
        return begin(self, checkpoint)

    begin = loop.Loop.start
    monkeypatch.setattr(SaliencyMask, "from_fisher", classmethod(from_fisher))
    monkeypatch.setattr(loop.Loop, "start", start)
    gc.disable()  # not by chance either
    try:
        Unlearner(make(), Classification(), method(), fisher_storage=where).run(**DATA, output_dir=tmp_path)
    finally:
        gc.enable()
    count = len(list(make().parameters()))
    assert len(seen) == (1 if where == "disk" else 2) * count and alive == [0]


def test_the_file_goes_when_the_retain_pass_fails(tmp_path: Path) -> None:
    inputs, labels = DATA["retain"][0]
    bad = [(inputs * float("nan"), labels)]
    with pytest.raises(Exception, match=r"the loss of batch 0 of the retain set is nan"):
        Unlearner(make(), Classification(), method(), fisher_storage="disk").run(
            DATA["forget"], bad, output_dir=tmp_path
        )
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    with stored({"a": torch.ones(3), "b": torch.ones(3)}, "disk", tmp_path) as found:
        (path,) = tmp_path.iterdir()
        os.truncate(path, path.stat().st_size - 1)
        assert torch.equal(found["a"], torch.ones(3))
        with pytest.raises(InputError, match=r"fisher-forget\.safetensors has become shorter"):
            found["b"]


def test_what_a_killed_run_left_is_removed_and_a_users_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "fisher-forget.safetensors").write_bytes(b"mine")
    with stored({"a": torch.ones(3)}, "disk", tmp_path) as found:
        (path,) = tmp_path.glob(".*")
        killed = path.read_bytes()
        assert torch.equal(found["a"], torch.ones(3))
    path.write_bytes(killed)
    sweep(tmp_path, held=True)  # as the next run's lock does
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


def test_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch) -> None:
    def full(path, sums):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage_module, "_write", full)
    words = r"fisher-forget\.safetensors cannot be written \(No space left on device\): make room there, or set"
    with pytest.raises(InputError, match=words), stored(sums(), "disk", tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "where", "words"),
    [
        ({}, "gpu", "fisher_storage: expected one of device, host, disk, got 'gpu'"),
        ({"gamma": None, "mask_fraction": 0.5}, "host", "fisher_storage host makes a mask tensor by tensor, as gamma"),
        ({"gamma": None}, "disk", "fisher_storage disk makes a mask tensor by tensor"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict, where: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Unlearner(make(), Classification(), method(**settings), fisher_storage=where)


def test_a_file_needs_a_place() -> None:
    with pytest.raises(InputError, match="fisher_storage='disk' needs an output_dir"):
        Unlearner(make(), Classification(), method(), fisher_storage="disk").run(**DATA)


def test_a_header_is_a_multiple_of_eight_bytes(tmp_path: Path) -> None:
    """As the format asks for alignment; for names of every length."""
    for length in range(1, 9):
        path = tmp_path / "f.safetensors"
        storage_module._write(path, {"n" * length: torch.ones(2)})
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        assert size % 8 == 0 and len(raw) == 8 + size + 8
        assert json.loads(raw[8 : 8 + size]) == {"n" * length: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
