"""``torchrun -m unlearn_ext forget``: the folder that one process writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import pipelines
from helpers.denoisers import dit
from helpers.forgetting import SHORT, denoiser, hashes, plan_of, result, run
from helpers.processes import environment
from helpers.ranks import command, launch

from unlearn_ext.errors import InputError
from unlearn_ext.jobs import parallel
from unlearn_ext.models.weights import tie_embeddings

pytestmark = pytest.mark.ranks

pytest.importorskip("diffusers")
pytest.importorskip("mlxtend")
Start = Callable[..., str]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    pipelines.save_dit_pipeline(folder / "dit")
    pipelines.save_ddpm_pipeline(folder / "ddpm")
    pipelines.save_digit_folders(folder / "digits", 6)
    return folder


def forget(start: Start, home: Path, model: str, output: Path, *arguments: str) -> str:
    """On two ranks; what they printed."""
    own = ["--pretrained-model-name-or-path", str(home / model), "--data", str(home / "digits")]
    return start("forget", *own, "--output-dir", str(output), *SHORT, *arguments)


def torchrun(*arguments: str) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "unlearn_ext", *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment(OMP_NUM_THREADS=1),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def forked(*arguments: str) -> str:
    """As torchrun does, without the seconds that it and every import take."""
    ranks = launch(2, command, *arguments)
    assert not any(rank.code for rank in ranks), ranks[0].output[-3000:]
    return "".join(rank.output for rank in ranks)


@pytest.mark.parametrize(
    "start, model, way, more",
    [
        (
            torchrun,
            "dit",
            "fsdp",
            ["--checkpointing-steps", "1", "--save-weights", "ema", "--ema-decay", "0.5", "--keep-work"],
        ),
        (forked, "ddpm", "ddp", ["--null-class"]),
    ],
)
def test_two_ranks_write_what_one_process_writes(
    home: Path, tmp_path: Path, start: Start, model: str, way: str, more
) -> None:
    common = ["--forget-class", "3", "--fisher-batches", "1", *more]
    told = forget(start, home, model, tmp_path / "two", *common, "--parallel", way)
    assert told.count("not verified") == 1  # one rank tells
    assert run(home, model, tmp_path / "one", *common) == 0
    ours, alone, before = (denoiser(folder, model) for folder in (tmp_path / "two", tmp_path / "one", home / model))
    assert ours.keys() == alone.keys() == before.keys()
    moved = sum((alone[name] - before[name]).double().square().sum() for name in before).sqrt()
    apart = sum((ours[name] - alone[name]).double().square().sum() for name in before).sqrt()
    assert moved > 1e-3 and apart <= 0.02 * moved  # Adam's first steps of near-zero gradients are of any length
    mine, theirs = (hashes(folder) for folder in (tmp_path / "two", tmp_path / "one"))
    differ = {name for name in theirs if mine[name] != theirs[name]}
    assert mine.keys() == theirs.keys() and all("diffusion_pytorch_model" in name for name in differ)
    found, expected = result(tmp_path / "two"), result(tmp_path / "one")
    for key in ("forgotten", "mapping", "trained_weights", "sampling"):
        assert found[key] == expected[key], key
    assert found["mask_density"] == pytest.approx(expected["mask_density"], rel=2e-3)  # ratios at the cut round apart
    assert found["counts"]["retain_steps"] == expected["counts"]["retain_steps"] == 2
    lines = [json.loads(line) for line in (tmp_path / "two/unlearning/history.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1]
    if way == "fsdp":
        assert (tmp_path / "two.work/checkpoint-1/tensors").is_dir()
        emb = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"
        assert torch.equal(ours[emb.format(0)], ours[emb.format(1)])


def test_what_ranks_cannot_do_is_refused(home: Path, tmp_path: Path, monkeypatch) -> None:
    from unlearn_ext.jobs import dry_run, plan

    monkeypatch.setattr(plan, "world_size", lambda: 2)
    monkeypatch.setattr(dry_run, "world_size", lambda: 2)
    for options, message in (
        ({"weights_dtype": "bfloat16"}, "--weights-dtype bfloat16 is for one process: leave it out, or run without"),
        ({"optimizer_in_backward": True}, "--optimizer-in-backward is for one process"),
        ({"fisher_storage": "host"}, "--fisher-storage is for one process"),
        ({"channels_last": True, "parallel": "fsdp"}, "--channels-last with --parallel fsdp is for one process"),
    ):
        with pytest.raises(InputError, match=message):
            plan_of(home, "dit", tmp_path / "out", **options)
    with pytest.raises(InputError, match="--parallel: expected one of ddp, fsdp, got 'tp'"):
        plan_of(home, "dit", tmp_path / "out", parallel="tp")
    monkeypatch.setattr(plan, "wrap", lambda model, way: model)
    with pytest.raises(InputError, match="--dry-run tries batches in one process: run it without torchrun"):
        dry_run.estimate_run(plan_of(home, "dit", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_one_gpu_is_not_for_all_ranks(monkeypatch) -> None:
    assert parallel.start_ranks("cuda:1") == "cuda:1"  # without torchrun
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--device cuda:1 is one GPU for all ranks: say --device cuda"):
        parallel.start_ranks("cuda:1")


@pytest.mark.parametrize("tied", (False, True))
def test_a_sharded_dit_takes_a_batch_whether_its_embedders_are_tied_or_not(tied: bool) -> None:
    """It calls those of its first block from outside the block."""
    model = dit().eval()
    if tied:
        tie_embeddings(model)
    batch = (torch.ones(2, 2, 4, 4), torch.tensor([3, 5]), torch.tensor([0, 1]))
    expected = model(*batch).sample.detach()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        torch.testing.assert_close(parallel.shard(model)(*batch).sample.detach(), expected)
    finally:
        torch.distributed.destroy_process_group()
