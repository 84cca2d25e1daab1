"""Damage of checkpoints: noticed before anything is loaded, whatever bit it is, and survived where there is another."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.models import make
from helpers.runs import identical, method, run, weights

from unlearn_ext import InputError, Unlearner
from unlearn_ext.errors import DamagedError, UnlearningWarning
from unlearn_ext.tasks import Classification
from unlearn_ext.utils.seal import label_of, seal

SETTINGS = {"mask_scope": "all", "protect": True}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Checkpoints 6 and 12 of one run, with a mask, moments, averages and a history."""
    path = tmp_path_factory.mktemp("written")
    unlearner(make()).run(**data(), output_dir=path, checkpointing_steps=6)
    return path


def data() -> dict:
    from helpers.models import batches

    return {"forget": batches(3, 6, seed=1), "retain": batches(5, 6, seed=2)}


def unlearner(model: torch.nn.Module) -> Unlearner:
    return Unlearner(model, Classification(), method(**SETTINGS), ema_decay=0.5)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_any_flipped_bit_is_noticed(written: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(written, tmp_path / "copy") / "checkpoint-12"
    names = sorted(path.name for path in copy.iterdir())
    assert names == [
        "SHA256SUMS",
        "ema.safetensors",
        "history.jsonl",
        "mask.safetensors",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    model = make(seed=4)
    before, reader, draw = weights(model), unlearner(model), random.Random(7)
    for name in names:
        path = copy / name
        for bit in [0, 8 * path.stat().st_size - 1, *(draw.randrange(8 * path.stat().st_size) for _ in range(30))]:
            flip(path, bit)
            with pytest.raises(DamagedError, match=r"checkpoint-12 is damaged: its .*; resume from an earlier one$"):
                reader.open_checkpoint(copy.parent, copy)
            flip(path, bit)
    assert identical(before, weights(model))
    reader.open_checkpoint(copy.parent, copy)


def test_flips_in_the_hashes_and_in_the_run_s_id_are_noticed(written: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(written / "checkpoint-12", tmp_path / "checkpoint-12")
    reader, seal = unlearner(make()), copy / "SHA256SUMS"
    header = 8 * len(seal.read_bytes().partition(b"\n")[0])
    for bit in [*range(0, header, 5), *range(header, header + 16), *range(header, 8 * seal.stat().st_size, 101)]:
        flip(seal, bit)
        with pytest.raises(DamagedError):
            reader.open_checkpoint(None, copy)
        flip(seal, bit)


def test_the_hashes_are_those_that_sha256sum_checks(written: Path) -> None:
    for name in ("checkpoint-6", "checkpoint-12"):
        done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=written / name, check=False)
        assert done.returncode == 0


def test_a_shortened_list_of_hashes_is_noticed(written: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(written / "checkpoint-12", tmp_path / "checkpoint-12")
    lines = (copy / "SHA256SUMS").read_text().splitlines(keepends=True)
    (copy / "SHA256SUMS").write_text("".join(lines[:-1]))
    with pytest.raises(DamagedError, match="its SHA256SUMS cannot be read"):
        unlearner(make()).open_checkpoint(None, copy)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_weights_that_were_added_are_not_read(written: Path, tmp_path: Path) -> None:
    """A folder of that name holds the tensors of several ranks: nothing but its hash would tell whose they are."""
    from torch.distributed import checkpoint

    copy = shutil.copytree(written / "checkpoint-12", tmp_path / "checkpoint-12")
    model = make(seed=4)
    before, reader = weights(model), unlearner(model)
    for name in (".DS_Store", ".git/HEAD"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("of another program")
    saved = reader.open_checkpoint(None, copy)
    others = {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in saved.tensors.forms.items()}
    writer = checkpoint.HuggingFaceStorageWriter(str(tmp_path / "tensors"))
    checkpoint.save(others, storage_writer=writer, no_dist=True)
    for make_folder in (shutil.copytree, lambda source, target: target.symlink_to(source)):
        make_folder(tmp_path / "tensors", copy / "tensors")
        with pytest.raises(DamagedError, match=r"is damaged: it holds tensors.*, which is not in its SHA256SUMS; res"):
            reader.run(**data(), resume_from_checkpoint=copy)
        shutil.rmtree(copy / "tensors") if make_folder is shutil.copytree else (copy / "tensors").unlink()
    (copy / ".more.safetensors").touch()
    with pytest.raises(DamagedError, match=r"it holds \.more\.safetensors"):
        reader.open_checkpoint(None, copy)
    assert identical(before, weights(model))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("rng", 0, "torch"), "00ff"),
        (("rng", 0, "python", 1, 624), 10**6),
        (("rng", 0, "python", 2), "0.5"),
        (("rng", 0, "numpy", "state", "pos"), 10**6),  # which NumPy takes, and reads there
        (("rng", 0, "numpy", "state", "key"), {"array": [], "dtype": "V999999999"}),
        (("rng", 0, "generators"), [{"paths": {"retain.a": "x"}, "kind": "numpy.Generator.seed", "state": {}}]),
        (("rng", 0, "epochs"), {"retain": 10**400}),
        (("rng", 0, "counters"), {"retain": {"__class__": 3}}),
        (("rng", 0, "states"), {"retain": "{"}),
        (("rng",), []),
        (("streams", 0, "retain", "start", "torch"), "zz"),
        (("streams", 0, "retain", "taken"), 1.5),
        (("counts",), {"forget_steps": 1}),
        (("packed", "model"), {}),
    ],
)
def test_a_state_that_no_run_writes_is_refused_before_anything_changes(place, value, written, tmp_path) -> None:
    """Though its hashes fit, as those of a checkpoint from elsewhere may."""
    copy = shutil.copytree(written / "checkpoint-6", tmp_path / "checkpoint-6")
    document = json.loads((copy / "state.json").read_text())
    entry = document
    for key in place[:-1]:
        entry = entry[key]
    entry[place[-1]] = value
    (copy / "state.json").write_text(json.dumps(document))
    seal(copy, label_of(copy))
    model = make(seed=4)
    before, drawn = weights(model), torch.get_rng_state()
    with pytest.raises(DamagedError, match=r"is damaged: .*resume from an earlier one"):
        unlearner(model).run(**data(), resume_from_checkpoint=copy)
    assert identical(before, weights(model)) and torch.equal(drawn, torch.get_rng_state())


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "SHA256SUMS", "history.jsonl", "everything"])
def test_a_damaged_latest_gives_way_to_the_one_before(name: str, written: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(written, tmp_path / "copy")
    for path in (copy / "checkpoint-12").iterdir():
        if name in (path.name, "everything"):
            path.write_bytes(b"")
    whole, resumed = make(), make(seed=4)
    expected = unlearner(whole).run(**data())
    with pytest.warns(UnlearningWarning, match=r"checkpoint-12 is damaged: .*; the run goes on from checkpoint-6$"):
        result = unlearner(resumed).run(
            **data(), output_dir=copy, checkpointing_steps=6, resume_from_checkpoint="latest"
        )
    assert identical(weights(whole), weights(resumed)) and result.history == expected.history
    unlearner(make()).open_checkpoint(copy, copy / "checkpoint-12")  # written anew
    kept = [path.name for path in copy.glob("checkpoint-12-damaged-*")]
    assert kept == (["checkpoint-12-damaged-1"] if name == "everything" else [])  # nobody can say whose that is


def test_a_damaged_later_one_does_not_take_the_place_of_the_newest(written: Path, tmp_path: Path) -> None:
    """The limit is of those up to where the run is: what it has just written stays."""
    copy = shutil.copytree(written, tmp_path / "copy")
    flip(copy / "checkpoint-12" / "model.safetensors", 1234)

    class StopError(Exception):
        pass

    def stop(model, iteration):
        raise StopError

    with pytest.warns(UnlearningWarning, match="checkpoint-12 is damaged"), pytest.raises(StopError):
        unlearner(make(seed=4)).run(
            **data(),
            output_dir=copy,
            checkpointing_steps=1,
            checkpoints_total_limit=1,
            resume_from_checkpoint="latest",
            evaluate=stop,
            evaluate_every=9,
        )
    assert sorted(path.name for path in copy.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]
    with pytest.warns(UnlearningWarning, match="the run goes on from checkpoint-8$"):
        unlearner(make()).open_checkpoint(copy, "latest")


def test_where_all_are_damaged_the_run_is_refused(written: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(written, tmp_path / "copy")
    for path in copy.glob("checkpoint-*/optimizer.safetensors"):
        path.unlink()
    with pytest.raises(InputError, match=r"checkpoint-12 is damaged: its optimizer.* missing, and so are all others"):
        unlearner(make()).open_checkpoint(copy, "latest")


def test_a_checkpoint_of_other_settings_is_no_damage(written: Path) -> None:
    """It is not passed over for the one before."""
    with pytest.raises(InputError, match=r"checkpoint-12 was written with lr=0\.02"):
        Unlearner(make(), Classification(), method(**SETTINGS, lr=0.5), ema_decay=0.5).open_checkpoint(
            written, "latest"
        )


def test_all_is_on_the_disk_before_a_checkpoint_gets_its_name(tmp_path: Path, monkeypatch) -> None:
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def note_sync(handle) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def note_replace(source, target) -> None:
        events.append(("name", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    run(make(), output_dir=tmp_path, checkpointing_steps=12)
    named = events.index(("name", str(tmp_path / "checkpoint-12")))
    synced = [Path(path) for kind, path in events[:named] if kind == "sync"]
    folder = next(path.parent for path in synced if path.name == "state.json")
    for path in (tmp_path / "checkpoint-12").iterdir():
        assert folder / path.name in synced
    assert synced[-1] == folder  # its list of names, after all that is in it
    hashed = next(i for i, (kind, path) in enumerate(events) if kind == "name" and Path(path).name == "SHA256SUMS")
    for name in ("model.safetensors", "optimizer.safetensors", "mask.safetensors", "state.json", "history.jsonl"):
        assert ("sync", str(folder / name)) in events[:hashed]
    assert ("sync", str(tmp_path)) in events[named:]
