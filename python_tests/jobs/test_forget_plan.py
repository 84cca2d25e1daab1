"""The plan of ``unlearn-ext forget``: memory, disk and time, and what it says where there is too little of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from helpers.forgetting import plan_of, run, work

from unlearn_ext.errors import InputError
from unlearn_ext.jobs import dry_run
from unlearn_ext.jobs.dry_run import estimate_run
from unlearn_ext.jobs.run import ForgetRun


def test_a_dry_run_prints_the_plan_and_writes_nothing(home: Path, tmp_path: Path, capsys) -> None:
    options = ("--dry-run", "--checkpointing-steps", "1", "--json", str(tmp_path / "plan.json"))
    assert run(home, "dit", tmp_path / "out", "--forget-class", "three", *options) == 0
    text = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    for word in ("forget", "three", "keep", "nine", "trains", "peak:", "Fisher sums", "activations", "disk:", "time:"):
        assert word in text
    assert "checkpoints" in text and max(map(len, text.splitlines())) <= 80
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["peak_memory"] == max(sum(parts.values()) for parts in plan["memory"].values())
    assert plan["memory"]["Fisher"]["Fisher sums"] > 0 and plan["disk"]["checkpoints"] > 0
    assert plan["memory"].keys() == {"encoding", "Fisher", "mask", "iterations", "sampling"}
    times = {"encoding", "sampling_before", "fisher", "unlearning", "sampling_after"}
    assert plan["seconds"].keys() == times and all(seconds > 0 for seconds in plan["seconds"].values())
    assert plan["forget_classes"] == [3] and plan["mapping"][3]["index"] == 3 and plan["mapping"][3]["count"] == 4


def test_an_estimate_leaves_the_run_as_it_was(home: Path, tmp_path: Path, monkeypatch) -> None:
    plan = plan_of(home, "dit", tmp_path / "out")
    plan.model.transformer_blocks[0].train()
    modes = [module.training for module in plan.model.modules()]
    states = [generator.get_state() for generator in plan.task.generators()] + [torch.get_rng_state()]
    estimate_run(plan)
    assert modes == [module.training for module in plan.model.modules()] and len(set(modes)) == 2
    after = [generator.get_state() for generator in plan.task.generators()] + [torch.get_rng_state()]
    assert len(states) == 2 and all(torch.equal(a, b) for a, b in zip(states, after, strict=True))
    assert all(p.grad is None for p in plan.model.parameters()) and not (tmp_path / "out").exists()

    def fail(model, loss, *others, **arguments):
        loss().backward()
        raise torch.OutOfMemoryError

    monkeypatch.setattr(dry_run, "try_batch", fail)
    with pytest.raises(InputError, match="a batch of 4 does not fit in the memory of cpu: lower --train-batch-size"):
        estimate_run(plan)
    assert modes == [module.training for module in plan.model.modules()]
    after = [generator.get_state() for generator in plan.task.generators()] + [torch.get_rng_state()]
    assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True))
    assert all(p.grad is None for p in plan.model.parameters())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 1 TB"),
    ],
)
def test_a_run_without_enough_memory_says_which_options_help(home, tmp_path, monkeypatch, error) -> None:
    plan = plan_of(home, "dit", tmp_path / "out")

    def fail(*arguments):
        raise error

    monkeypatch.setattr(plan.task, "losses", fail)
    with pytest.raises(
        InputError,
        match=r"a batch of 4 does not fit in the memory of cpu: lower .*checkpointing or --optimizer-in-backward$",
    ):
        ForgetRun(plan).run()
    assert not (tmp_path / "out" / "model_index.json").exists()
    monkeypatch.setattr(plan.task, "losses", lambda *_: 1 / 0)  # another error is not taken for it
    with pytest.raises(ZeroDivisionError):
        ForgetRun(plan).run()


def test_the_disk_takes_what_was_estimated(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = plan_of(home, "dit", out, checkpointing_steps=1, save_weights="ema", ema_decay=0.5, keep_work=True)
    assert plan.tied
    disk = estimate_run(plan).disk
    ForgetRun(plan).run()

    def tensors(*patterns: str) -> int:
        files = [path for pattern in patterns for folder in (out, work(out)) for path in folder.glob(pattern)]
        return sum(tensor.nbytes for path in files for tensor in load_file(path).values())

    assert disk["denoiser"] == tensors("transformer/*.safetensors")
    assert disk["mask"] == tensors("unlearning/mask.safetensors")
    assert disk["checkpoints"] == pytest.approx(tensors("checkpoint-*/*.safetensors"), rel=0.01)
    assert disk["latents"] == pytest.approx(tensors("latents/*.safetensors"), rel=0.05)  # and their indices


def test_a_disk_too_small_for_all_that_is_written_is_refused(home: Path, tmp_path: Path, monkeypatch) -> None:
    options = {"checkpointing_steps": 1, "checkpoints_total_limit": 1}
    plan = plan_of(home, "dit", tmp_path / "out", **options)
    needed = sum(estimate_run(plan).disk.values())
    assert needed > 2 * plan.folder.bytes
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if fits:
            ForgetRun(plan).run()
        else:
            with pytest.raises(InputError, match="GB free, and the run writes"):
                ForgetRun(plan).run()
