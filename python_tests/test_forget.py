"""``unlearn-ext forget`` from end to end, on small pipelines built from configurations and real digits."""

from __future__ import annotations

import ast
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import shared_digits
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from forgetting import SHORT, SMALL, Killed, hashes, job_of, result, run, run_killed_at
from pipelines import (
    NAMES,
    save_classifier,
    save_ddpm_pipeline,
    save_digit_folders,
    save_dit_pipeline,
    save_model_and_scheduler,
    save_text_pipeline,
)

from unlearn_ext.cli import main
from unlearn_ext.data import _folders
from unlearn_ext.diffusion import dry_run
from unlearn_ext.diffusion import job as job_module
from unlearn_ext.errors import InputError
from unlearn_ext.saliency import SaliencyMask


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("forget")
    save_digit_folders(home / "digits", per_class=4)
    save_digit_folders(home / "named", per_class=4, names=NAMES)
    save_dit_pipeline(home / "dit")
    save_ddpm_pipeline(home / "ddpm")
    save_text_pipeline(home / "text")
    save_model_and_scheduler(home / "bare")
    return home


# --- Pipelines in, pipelines out ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "weights", "arguments"),
    [
        ("dit", "transformer/diffusion_pytorch_model.safetensors", ("--forget-class", "three")),
        ("ddpm", "unet/diffusion_pytorch_model.safetensors", ("--forget-class", "3, 7")),
        ("bare", "diffusion_pytorch_model.safetensors", ("--forget-class", "3")),
        ("text", "unet/diffusion_pytorch_model.safetensors", ("--forget-prompt", "three", "--replace-prompt", "two")),
    ],
)
def test_only_the_denoisers_weights_differ(home: Path, tmp_path: Path, capsys, model, weights, arguments) -> None:
    data = "named" if model == "text" else "digits"
    assert run(home, model, tmp_path / "out", *arguments, data=data) == 0
    before, after = hashes(home / model), hashes(tmp_path / "out")
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == [weights]
    old, new = load_file(home / model / weights), load_file(tmp_path / "out" / weights)
    assert old.keys() == new.keys() and any(not torch.equal(old[name], new[name]) for name in old)
    assert all(bool(torch.isfinite(value).all()) for value in new.values())
    found = result(tmp_path / "out")
    assert found["verdict"].startswith("not verified") and "not verified" in capsys.readouterr().out
    assert found["counts"]["forget_steps"] == found["counts"]["retain_steps"] == 2
    assert {path.name for path in (tmp_path / "out" / "unlearning").iterdir()} >= {
        "before-after.png",
        "mask.safetensors",
        "history.jsonl",
        "result.json",
    }


def test_a_model_that_has_forgotten_forgets_again(home: Path, tmp_path: Path) -> None:
    """The record of the first time is no part of the model."""
    assert run(home, "dit", tmp_path / "once", "--forget-class", "3", "--checkpointing-steps", "2") == 0
    assert run(tmp_path, "once", tmp_path / "twice", "--forget-class", "5", data=str(home / "digits")) == 0
    assert hashes(tmp_path / "twice").keys() == hashes(home / "dit").keys()
    assert result(tmp_path / "twice")["forgotten"] == ["five"]


def test_files_that_are_left_out_are_named(home: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(home / "ddpm", tmp_path / "ddpm")
    (tmp_path / "ddpm" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"old")
    (tmp_path / "ddpm" / "all.ckpt").write_bytes(b"old")
    assert run(tmp_path, "ddpm", tmp_path / "out", "--forget-class", "3", data=str(home / "digits")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "left out of the model's folder: all.ckpt, unet/diffusion_pytorch_model.bin" in lines
    assert set(result(tmp_path / "out")["left_out"]) == {"all.ckpt", "unet/diffusion_pytorch_model.bin"}
    assert run(home, "ddpm", tmp_path / "none", "--forget-class", "3") == 0
    assert "left out" not in capsys.readouterr().out and not result(tmp_path / "none")["left_out"]


def test_the_written_pipelines_open_and_sample(home: Path, tmp_path: Path) -> None:
    from diffusers import DiTPipeline, StableDiffusionPipeline, UNet2DModel

    assert run(home, "dit", tmp_path / "dit", "--forget-class", "3") == 0
    pipe = DiTPipeline.from_pretrained(tmp_path / "dit", local_files_only=True)
    blocks = pipe.transformer.transformer_blocks
    first, second = (block.norm1.emb.state_dict() for block in blocks)
    assert all(torch.equal(first[name], second[name]) for name in first)  # tied while they were trained
    original = load_file(home / "dit" / "transformer" / "diffusion_pytorch_model.safetensors")
    key = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    assert not torch.equal(first["class_embedder.embedding_table.weight"], original[key])
    prompts = ("--forget-prompt", "three", "--replace-prompt", "two")
    assert run(home, "text", tmp_path / "text", *prompts, data="named") == 0
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "text", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    assert pipe("three", num_inference_steps=2, generator=generator, output_type="np").images.shape[0] == 1
    assert run(home, "ddpm", tmp_path / "ddpm", "--forget-class", "3") == 0
    UNet2DModel.from_pretrained(tmp_path / "ddpm" / "unet", local_files_only=True)


def test_reloaded_outputs_are_those_of_the_model_in_memory(home: Path, tmp_path: Path, monkeypatch) -> None:
    from unlearn_ext.diffusion import output
    from unlearn_ext.diffusion.pretrained import open_pretrained

    kept = {}
    write = output.write_result

    def keep(source, pretrained, *arguments, **options):
        kept[str(source)] = pretrained
        return write(source, pretrained, *arguments, **options)

    monkeypatch.setattr(output, "write_result", keep)
    for model in ("dit", "ddpm", "text"):
        prompts = ("--forget-prompt", "three", "--replace-prompt", "two")
        arguments = prompts if model == "text" else ("--forget-class", "3")
        data = "named" if model == "text" else "digits"
        assert run(home, model, tmp_path / model, *arguments, data=data) == 0
        own, reloaded = kept[str(home / model)], open_pretrained(tmp_path / model)
        x = torch.randn(2, *own.latent_shape, generator=torch.Generator().manual_seed(1))
        t = torch.tensor([3, 40])
        if model == "text":
            conditions = {"encoder_hidden_states": torch.ones(2, 8, 16)}
        else:
            conditions = {"class_labels": torch.tensor([3, 10])}
        with torch.no_grad():
            a, b = (m.denoiser.eval()(x, t, **conditions).sample for m in (own, reloaded))
        assert torch.equal(a, b)


def test_latents_are_encoded_once_and_only_those_that_are_used(home: Path, tmp_path: Path) -> None:
    assert run(home, "dit", tmp_path / "out", "--forget-class", "3") == 0
    manifest = json.loads((tmp_path / "out" / "unlearning" / "latents" / "manifest.json").read_text())
    # Two batches of four from each set, of the four images of the forgotten digit and of the 36 others.
    assert len(manifest["indices"]) == 4 + 8
    assert result(tmp_path / "out")["seconds"]["encoding"] > 0


def test_a_small_forget_set_is_measured_once(home: Path, tmp_path: Path) -> None:
    """However long the iterations and the other set are."""
    seen: dict[str, tuple[int, int | None]] = {}
    for given, measured in ((None, (1, 9)), (5, (1, 5))):  # of four images and of 36
        job = job_of(home, "ddpm", tmp_path / str(given), max_train_steps=3, fisher_batches=given)
        job.progress = lambda stage, done, total: seen.update({stage: (done, total)})
        assert job.run()["method"]["fisher_batches"] == measured == job.fisher_batches
        assert seen["Fisher, forget set"] == (1, 1) and seen["Fisher, retain set"] == (measured[1],) * 2


def test_arrays_of_images_and_of_latents(home: Path, tmp_path: Path) -> None:
    import numpy as np
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat(3)
    np.savez(tmp_path / "images.npz", images=np.zeros((30, 16, 16), np.uint8), labels=labels.numpy())
    save_file({"latents": torch.randn(30, 4, 8, 8, generator=generator), "labels": labels}, tmp_path / "z.safetensors")
    for model, data in (("ddpm", "images.npz"), ("dit", "z.safetensors")):
        own = ["--pretrained-model-name-or-path", str(home / model), "--data", str(tmp_path / data)]
        out = tmp_path / model
        assert main(["forget", *own, "--output-dir", str(out), *SMALL, "--forget-class", "3"]) == 0
        assert not (out / "unlearning" / "latents").exists()


# --- Options --------------------------------------------------------------------------------------------------------


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


def test_names_with_brackets_are_printed_as_they_are(home: Path, tmp_path: Path, capsys) -> None:
    odd = "[bold]x:cat:"  # markup and an emoji to rich
    save_digit_folders(tmp_path / "few", per_class=4, digits=(3, 5))
    (tmp_path / "few" / "3").rename(tmp_path / "few" / odd)
    (tmp_path / "map.json").write_text(json.dumps({odd: 3, "5": 5}))
    own = ["--pretrained-model-name-or-path", str(home / "ddpm"), "--data", str(tmp_path / "few"), *SMALL]
    own += ["--class-map", str(tmp_path / "map.json"), "--null-class", "--forget-class", "3"]
    assert main(["forget", *own, "--output-dir", str(tmp_path / odd)]) == 0
    text = capsys.readouterr().out
    table, _, end = text.partition("model: ")
    assert odd in table.replace("\n", "") and end.splitlines() == [
        str(tmp_path / odd),
        f"pictures before and after: {tmp_path / odd / 'unlearning' / 'before-after.png'}",
    ]
    assert main(["forget", *own, "--output-dir", str(tmp_path / odd)]) == 1
    assert f"{tmp_path / odd} holds" in capsys.readouterr().err


def test_an_estimate_leaves_the_run_as_it_was(home: Path, tmp_path: Path, monkeypatch) -> None:
    job = job_of(home, "dit", tmp_path / "out")
    job.model.transformer_blocks[0].train()
    modes = [module.training for module in job.model.modules()]
    states = [generator.get_state() for generator in job.task.generators()] + [torch.get_rng_state()]
    job.estimate()
    assert modes == [module.training for module in job.model.modules()] and len(set(modes)) == 2
    after = [generator.get_state() for generator in job.task.generators()] + [torch.get_rng_state()]
    assert len(states) == 2 and all(torch.equal(a, b) for a, b in zip(states, after, strict=True))
    assert all(p.grad is None for p in job.model.parameters()) and not (tmp_path / "out").exists()

    def fail(model, loss, *others, **arguments):
        loss().backward()
        raise torch.OutOfMemoryError

    monkeypatch.setattr(dry_run, "try_batch", fail)
    with pytest.raises(InputError, match="a batch of 4 does not fit in the memory of cpu: lower --train-batch-size"):
        job.estimate()
    assert modes == [module.training for module in job.model.modules()]
    after = [generator.get_state() for generator in job.task.generators()] + [torch.get_rng_state()]
    assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True))
    assert all(p.grad is None for p in job.model.parameters())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 1 TB"),
    ],
)
def test_a_run_without_enough_memory_says_which_options_help(home, tmp_path, monkeypatch, error) -> None:
    job = job_of(home, "dit", tmp_path / "out")

    def fail(*arguments):
        raise error

    monkeypatch.setattr(job.task, "losses", fail)
    with pytest.raises(
        InputError,
        match=r"a batch of 4 does not fit in the memory of cpu: lower .*checkpointing or --optimizer-in-backward$",
    ):
        job.run()
    assert not (tmp_path / "out" / "model_index.json").exists()
    monkeypatch.setattr(job.task, "losses", lambda *_: 1 / 0)  # another error is not taken for it
    with pytest.raises(ZeroDivisionError):
        job.run()


def test_the_disk_takes_what_was_estimated(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = job_of(home, "dit", out, checkpointing_steps=1, save_weights="ema", ema_decay=0.5)
    assert job.tied
    disk = job.estimate().disk
    job.run()

    def tensors(*patterns: str) -> int:
        files = [path for pattern in patterns for path in out.glob(pattern)]
        return sum(tensor.nbytes for path in files for tensor in load_file(path).values())

    assert disk["denoiser"] == tensors("transformer/*.safetensors")
    assert disk["mask"] == tensors("unlearning/mask.safetensors")
    assert disk["checkpoints"] == pytest.approx(tensors("unlearning/checkpoint-*/*.safetensors"), rel=0.01)
    assert disk["latents"] == pytest.approx(tensors("unlearning/latents/*.safetensors"), rel=0.05)  # and their indices


def test_a_disk_too_small_for_all_that_is_written_is_refused(home: Path, tmp_path: Path, monkeypatch) -> None:
    options = {"checkpointing_steps": 1, "checkpoints_total_limit": 1}
    job = job_of(home, "dit", tmp_path / "out", **options)
    needed = sum(job.estimate().disk.values())
    assert needed > 2 * job._plan.bytes
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if fits:
            job.run()
        else:
            with pytest.raises(InputError, match="GB free, and the run writes"):
                job.run()


def test_a_mask_is_reused_and_refused_where_it_does_not_belong(home: Path, tmp_path: Path, capsys) -> None:
    assert run(home, "ddpm", tmp_path / "first", "--forget-class", "3") == 0
    mask = str(tmp_path / "first" / "unlearning" / "mask.safetensors")
    assert run(home, "ddpm", tmp_path / "x", "--forget-class", "3", "--mask", mask) == 1
    assert "leave one of them out" in capsys.readouterr().err
    own = ["--pretrained-model-name-or-path", str(home / "ddpm"), "--data", str(home / "digits"), "--mask", mask]
    assert main(["forget", *own, *SHORT, "--output-dir", str(tmp_path / "second"), "--forget-class", "3"]) == 0
    assert result(tmp_path / "second")["mask_density"] == result(tmp_path / "first")["mask_density"]
    assert "fisher" not in result(tmp_path / "second")["seconds"]
    capsys.readouterr()
    save_ddpm_pipeline(tmp_path / "other", seed=1)
    shutil.copytree(home / "digits", tmp_path / "more")
    shutil.copy(tmp_path / "more" / "3" / "000.png", tmp_path / "more" / "3" / "more.png")
    for model, data, forgotten, words in (
        (home / "ddpm", home / "digits", "4", "was made for another forget set (forget_classes"),
        (home / "ddpm", tmp_path / "more", "3", "was made for another forget set (forget_data"),
        (tmp_path / "other", home / "digits", "3", "was made for other weights"),
    ):
        own = ["--pretrained-model-name-or-path", str(model), "--data", str(data), "--mask", mask, *SHORT]
        for more in ([], ["--dry-run"]):
            assert main(["forget", *own, "--output-dir", str(tmp_path / "x"), "--forget-class", forgotten, *more]) == 1
            error = capsys.readouterr().err
            assert words in error and error.endswith("leave it out and a new one is measured\n")
            assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("unsaid", ["forget_classes", "forget_data", "weights_hash"])
def test_a_mask_that_does_not_say_what_it_was_made_for(home: Path, tmp_path: Path, capsys, unsaid: str) -> None:
    """As one that was made in Python: the user can say it."""
    assert run(home, "ddpm", tmp_path / "first", "--forget-class", "3") == 0
    mask = SaliencyMask.load(tmp_path / "first" / "unlearning" / "mask.safetensors")
    said = mask.metadata.pop(unsaid)
    mask.save(tmp_path / "mask.safetensors")
    own = ["--pretrained-model-name-or-path", str(home / "ddpm"), "--data", str(home / "digits"), *SHORT]
    own += ["--mask", str(tmp_path / "mask.safetensors"), "--forget-class", "3", "--output-dir", str(tmp_path / "out")]
    capsys.readouterr()
    assert main(["forget", *own]) == 1
    error = capsys.readouterr().err
    assert "does not say what it was made for" in error and not (tmp_path / "out").exists()
    words = ast.literal_eval(error.rpartition("metadata.update(")[2].rstrip(")\n"))
    assert words == {unsaid: said}
    mask.metadata.update(words)
    mask.save(tmp_path / "mask.safetensors")
    assert main(["forget", *own]) == 0


def test_trained_weights_are_chosen(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prompts = ("--forget-prompt", "three", "--replace-prompt", "two")
    assert run(home, "text", out, *prompts, "--trained-weights", "cross-attention", data="named") == 0
    weights = "unet/diffusion_pytorch_model.safetensors"
    old, new = load_file(home / "text" / weights), load_file(out / weights)
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved and all("attn2" in name for name in moved)


def test_a_killed_run_is_resumed_to_the_same_weights(home: Path, tmp_path: Path, monkeypatch) -> None:
    steps = ("--forget-class", "3", "--max-train-steps", "4", "--checkpointing-steps", "2")
    steps += ("--save-weights", "ema", "--ema-decay", "0.5")
    assert run(home, "dit", tmp_path / "whole", *steps) == 0
    run_killed_at(3, monkeypatch, home, "dit", tmp_path / "cut", *steps)
    assert not (tmp_path / "cut" / "model_index.json").exists()
    assert run(home, "dit", tmp_path / "cut", *steps, "--resume-from-checkpoint", "latest") == 0
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")
    assert (tmp_path / "cut" / "unlearning" / "checkpoint-4").is_dir()


def kill_in_move(home: Path, out: Path, monkeypatch, *, at: int, after: bool = False) -> list[str]:
    """Runs until the ``at``-th entry is to be moved, or was; returns the names in the order of moving."""
    moved, replace = [], os.replace

    def die(source, target):
        final = Path(target).parent == out
        if final:
            moved.append(Path(target).name)
        if len(moved) == at and final and not after:
            raise Killed
        replace(source, target)
        if len(moved) == at and final:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(Killed):
            run(home, "ddpm", out, "--forget-class", "3", "--checkpointing-steps", "2")
    return moved


def test_checkpoints_are_not_run_over(home: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "out" / "unlearning" / "checkpoint-2").mkdir(parents=True)
    monkeypatch.setattr(job_module, "open_pretrained", None)  # refused before anything is opened
    for more in ((), ("--dry-run",)):
        assert run(home, "ddpm", tmp_path / "out", "--forget-class", "3", *more) == 1
        assert "add --resume-from-checkpoint latest" in capsys.readouterr().err


def test_a_result_half_moved_is_moved_by_the_next_run(home: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    steps = ("--forget-class", "3", "--checkpointing-steps", "2")
    assert run(home, "ddpm", tmp_path / "whole", *steps) == 0
    out = tmp_path / "cut"
    _, second = kill_in_move(home, out, monkeypatch, at=2)
    (out / second).mkdir()
    (out / second / "mine.txt").write_text("mine")
    (out / "note.txt").write_text("mine")
    there = sorted(str(path) for path in out.rglob("*"))
    for _ in range(2):
        capsys.readouterr()
        assert run(home, "ddpm", out, *steps) == 1
        assert f"holds {second}, where the result in" in capsys.readouterr().err
        assert sorted(str(path) for path in out.rglob("*")) == there
    (out / second).rename(tmp_path / "away")
    assert run(home, "ddpm", out, *steps, "--resume-from-checkpoint", "latest") == 1
    assert "its model is whole now" in capsys.readouterr().err
    assert (out / "note.txt").read_text() == (tmp_path / "away" / "mine.txt").read_text() == "mine"
    (out / "note.txt").unlink()
    assert hashes(out) == hashes(tmp_path / "whole")
    assert not (out / "unlearning" / "folder").exists()
    assert run(home, "ddpm", out, *steps) == 1
    assert "already: choose an empty folder" in capsys.readouterr().err
    assert hashes(out) == hashes(tmp_path / "whole")


def test_a_run_killed_after_its_last_move_keeps_its_result(home: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "cut"
    entries = len(list((home / "ddpm").iterdir()))
    assert kill_in_move(home, out, monkeypatch, at=entries, after=True)[-1] == "model_index.json"
    before = hashes(out)
    assert before.keys() == hashes(home / "ddpm").keys()
    for sentence in ("its model is whole now", "already: choose an empty folder"):
        assert run(home, "ddpm", out, "--forget-class", "3") == 1
        assert sentence in capsys.readouterr().err
        assert hashes(out) == before


def test_what_a_killed_run_was_writing_goes_only_when_a_run_takes_the_folder(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    left = out / "unlearning" / ".folder-abc"
    left.mkdir(parents=True)
    (left / "part").write_text("half")
    (out / ".folder-mine").mkdir()
    assert run(home, "ddpm", out, "--forget-class", "3") == 1
    assert (left / "part").exists() and (out / ".folder-mine").exists()
    (out / ".folder-mine").rmdir()
    assert run(home, "ddpm", out, "--forget-class", "3") == 0
    assert not left.exists()


def test_a_checkpoint_of_another_forget_set_is_not_resumed(home, tmp_path, capsys, monkeypatch) -> None:
    steps = ("--max-train-steps", "2", "--checkpointing-steps", "1")
    assert run(home, "ddpm", tmp_path / "out", "--forget-class", "3", *steps) == 0
    for path in (tmp_path / "out").iterdir():
        if path.name != "unlearning":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    capsys.readouterr()
    for more in ([], ["--dry-run"]):
        with monkeypatch.context() as patch:  # known before a picture is decoded
            patch.setattr(_folders.Folders, "_decode", lambda self, index: pytest.fail("an image was decoded"))
            again = ["--forget-class", "4", *steps, "--resume-from-checkpoint", "latest", *more]
            assert run(home, "ddpm", tmp_path / "out", *again) == 1
    assert "forget_classes='3'" in capsys.readouterr().err


def test_a_checkpoint_of_other_starting_weights_is_not_resumed(home: Path, tmp_path: Path, capsys) -> None:
    other = save_ddpm_pipeline(tmp_path / "other", seed=5)
    steps = ("--forget-class", "3", "--max-train-steps", "2", "--checkpointing-steps", "1")
    assert run(home, "ddpm", tmp_path / "out", *steps) == 0
    for path in (tmp_path / "out").iterdir():
        if path.name != "unlearning":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    own = ["--pretrained-model-name-or-path", str(other), "--data", str(home / "digits"), *SMALL]
    capsys.readouterr()
    out = ["--output-dir", str(tmp_path / "out"), "--resume-from-checkpoint", "latest"]
    assert main(["forget", *own, *steps, *out]) == 1
    assert "was written with starting_weights=" in capsys.readouterr().err


def test_averages_are_saved_when_asked_for(home: Path, tmp_path: Path) -> None:
    assert run(home, "ddpm", tmp_path / "last", "--forget-class", "3") == 0
    averages = ("--save-weights", "ema", "--ema-decay", "0.5")
    assert run(home, "ddpm", tmp_path / "ema", "--forget-class", "3", *averages) == 0
    weights = "unet/diffusion_pytorch_model.safetensors"
    old, last, ema = (load_file(folder / weights) for folder in (home / "ddpm", tmp_path / "last", tmp_path / "ema"))
    name = "conv_in.weight"
    assert float((ema[name] - old[name]).norm()) < float((last[name] - old[name]).norm())
    assert result(tmp_path / "ema")["weights"] == {"saved": "ema", "ema_decay": 0.5}
    assert result(tmp_path / "last")["weights"] == {"saved": "last", "ema_decay": None}


@pytest.mark.parametrize(
    "options", [("--mixed-precision", "bf16"), ("--channels-last",), ("--gradient-checkpointing",)]
)
def test_ways_to_run(home: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    arguments = ("--forget-class", "3", "--gradient-accumulation-steps", "2", *options)
    assert run(home, "ddpm", tmp_path / "out", *arguments) == 0
    assert result(tmp_path / "out")["counts"]["forget_steps"] == 2


def test_a_classifier_judges(home: Path, tmp_path: Path, capsys) -> None:
    save_classifier(tmp_path / "judge", tuple(reversed(NAMES)))  # in another order than the model's
    options = ("--forget-class", "3", "--classifier", str(tmp_path / "judge"), "--samples", "2")
    assert run(home, "dit", tmp_path / "out", *options) == 0
    verdict = result(tmp_path / "out")["verdict"]
    for when in ("before", "after"):
        assert list(verdict[when]["forgotten"]) == ["three"] and verdict[when]["forgotten"]["three"]["count"] == 2
        assert len(verdict[when]["retained"]) == 8
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if str(tmp_path) not in line]  # a path is not broken
    assert "three (forgotten)" in out and max(map(len, lines)) <= 80


def test_a_picture_may_be_taken_for_what_the_generator_does_not_know(tmp_path: Path) -> None:
    """Or two prompts judged by a thousand classes would get half of any noise right."""
    from unlearn_ext.diffusion.judge import Judge
    from unlearn_ext.evaluation.generated import class_scores

    model = save_classifier(tmp_path, ("a cat", "noise", "a dog"))
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 5.0, 1.0]))
    model.save_pretrained(tmp_path)
    judge = Judge(tmp_path, {0: "A dog", 1: "a cat"}, (3, 16, 16))
    assert judge.columns == {0: 2, 1: 0}
    probabilities = judge.probabilities(torch.zeros(4, 3, 16, 16))
    scores = class_scores(probabilities, torch.tensor([2, 2, 0, 0]))
    assert {label: score["accuracy"] for label, score in scores.items()} == {0: 0.0, 2: 0.0}
    with torch.no_grad():
        judge.model.classifier.bias.copy_(torch.tensor([0.0, 0.5, 1.0]))
    scores = class_scores(judge.probabilities(torch.zeros(4, 3, 16, 16)), torch.tensor([2, 2, 0, 0]))
    assert {label: score["accuracy"] for label, score in scores.items()} == {0: 0.0, 2: 1.0}


def test_a_classifier_that_cannot_judge_is_refused_before_anything_is_done(home: Path, tmp_path: Path, capsys) -> None:
    """Of 16 x 16 pixels, and its image processor makes 224 x 224 of a picture."""
    from transformers import ViTImageProcessor

    save_classifier(tmp_path / "judge", [str(i) for i in range(10)])
    ViTImageProcessor().save_pretrained(tmp_path / "judge")
    for more in ([], ["--dry-run"]):
        options = ["--forget-class", "3", "--classifier", str(tmp_path / "judge"), *more]
        assert run(home, "ddpm", tmp_path / "out", *options) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: --classifier: ") and "cannot judge a picture of this model" in error
    assert not (tmp_path / "out").exists()


def test_a_classifier_that_fails_in_the_end_costs_no_result(home: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    from unlearn_ext.diffusion.judge import Judge

    save_classifier(tmp_path / "judge", [str(i) for i in range(10)])
    probabilities = Judge.probabilities

    def fail(self, pictures):
        if len(pictures) > 1:
            raise RuntimeError("out of luck")
        return probabilities(self, pictures)

    monkeypatch.setattr(Judge, "probabilities", fail)
    options = ("--forget-class", "3", "--classifier", str(tmp_path / "judge"), "--samples", "1")
    assert run(home, "ddpm", tmp_path / "out", *options) == 0
    assert result(tmp_path / "out")["verdict"].startswith("not verified: the classifier failed on the pictures before")
    assert "out of luck" in capsys.readouterr().out


def test_classes_that_share_a_text_go_by_index_or_are_refused() -> None:
    from types import SimpleNamespace

    from unlearn_ext.diffusion.judge import _match
    from unlearn_ext.errors import InputError

    config = SimpleNamespace(id2label={0: "crane", 1: "cat", 2: "crane"}, num_labels=3)
    assert _match({0: "crane", 1: "cat", 2: "crane"}, config) == [0, 1, 2]
    with pytest.raises(InputError, match="more than one class is called 'crane'"):
        _match({0: "cat", 1: "crane"}, config)


# --- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "arguments", "sentence"),
    [
        ("dit", ("--forget-class", "11"), "11"),
        ("dit", ("--forget-class", "thre"), "three"),
        ("dit", (), "say what to forget"),
        ("dit", ("--forget-prompt", "a"), "go together"),
        ("dit", ("--forget-prompt", "a", "--replace-prompt", "b"), "give --forget-class"),
        ("text", ("--forget-class", "3"), "give --forget-prompt"),
        ("text", ("--forget-prompt", "eleven", "--replace-prompt", "b"), "no folder belongs to 'eleven'"),
        ("dit", ("--forget-class", "3", "--gamma", "1", "--mask-fraction", "0.5"), "give only one"),
        ("dit", ("--forget-class", "3", "--preset", "x"), "--preset: expected one of"),
        ("dit", ("--forget-class", "3", "--preset", "sd-nudity"), "--preset sd-nudity is for other models"),
        ("text", ("--forget-prompt", "a", "--replace-prompt", "a"), "expected another prompt"),
        ("dit", ("--forget-class", "3", "--checkpoints-total-limit", "0"), "--checkpoints-total-limit"),
        ("dit", ("--forget-class", "3", "--checkpoints-total-limit", "2"), "add --checkpointing-steps"),
        ("dit", ("--forget-class", "3", "--ema-decay", "0.9"), "add --save-weights ema"),
        ("dit", ("--forget-class", "3", "--samples", "16"), "add --classifier"),
        ("dit", ("--forget-class", "3", "--mask", "nowhere"), "--mask: there is no file"),
        ("dit", ("--forget-class", "3", "--resume-from-checkpoint", "latest"), "there is no checkpoint in"),
        ("dit", ("--forget-class", "3", "--resume-from-checkpoint", "nowhere"), "there is no checkpoint at nowhere"),
        ("dit", ("--forget-class", "3", "--num-inference-steps", "51"), "--num-inference-steps: expected at most 50"),
        ("dit", ("--forget-class", "3", "--classifier", "nowhere"), "--classifier: expected"),
        ("dit", ("--forget-class", "3", "--mixed-precision", "fp16"), "fp16 needs a GPU"),
        ("ddpm", ("--forget-class", "3", "--save-weights", "ema"), "needs --ema-decay"),
        ("dit", ("--forget-class", "3", "--trained-weights", "nothing"), "trained weights"),
        ("nowhere", ("--forget-class", "3"), "there is no folder"),
        ("dit", ("--forget-class", "3", "--max-train-steps", "0"), "--max-train-steps"),
        ("dit", ("--forget-class", "0,1,2,3,4,5,6,7,8,9"), "every class is to be forgotten"),
        ("dit", ("--forget-class", "3", "--dry-run", "--json", "{out}/x.json"), "--json: a dry run writes nothing"),
        ("dit", ("--forget-class", "3", "--json", "missing/x.json"), "--json: expected a file in a directory"),
    ],
)
def test_bad_input_is_one_sentence(home: Path, tmp_path: Path, capsys, model, arguments, sentence) -> None:
    arguments = [argument.format(out=tmp_path / "out") for argument in arguments]
    assert run(home, model, tmp_path / "out", *arguments) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and sentence in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_not_empty_is_refused(home: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "note.txt").write_text("mine")
    assert run(home, "ddpm", tmp_path, "--forget-class", "3") == 1
    assert "note.txt already" in capsys.readouterr().err
    for inside in (home / "ddpm", home / "ddpm" / "forgotten"):
        assert run(home, "ddpm", inside, "--forget-class", "3") == 1
        assert "lies in the model's own folder" in capsys.readouterr().err
    assert not (home / "ddpm" / "forgotten").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_unreadable_images_are_named_and_skipped_or_refused(home: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(home / "digits", tmp_path / "digits")
    (tmp_path / "digits" / "3" / "000.png").write_bytes(b"no picture")
    own = ["--pretrained-model-name-or-path", str(home / "ddpm"), "--data", str(tmp_path / "digits")]
    own += ["--forget-class", "3", *SMALL]
    assert main(["forget", *own, "--output-dir", str(tmp_path / "strict"), "--strict"]) == 1
    assert "000.png" in capsys.readouterr().err
    assert not (tmp_path / "strict" / "model_index.json").exists()
    assert main(["forget", *own, "--output-dir", str(tmp_path / "out")]) == 0
    assert len(result(tmp_path / "out")["unreadable"]) == 1
    assert "000.png" in capsys.readouterr().out


@pytest.mark.parametrize("files", ["3/*.png", "*/*.png"])
def test_nothing_stays_where_a_class_has_no_readable_image(home: Path, tmp_path: Path, capsys, files: str) -> None:
    data = tmp_path / "damaged"
    shutil.copytree(home / "digits", data)
    for image in data.glob(files):
        image.write_bytes(b"no picture")
    own = ["--pretrained-model-name-or-path", str(home / "dit"), "--data", str(data), "--forget-class", "3", *SMALL]
    assert main(["forget", *own, "--output-dir", str(tmp_path / "out")]) == 1
    assert "none of " in capsys.readouterr().err and not (tmp_path / "out").exists()
    shutil.rmtree(data)
    shutil.copytree(home / "digits", data)  # mended, and run again
    assert main(["forget", *own, "--output-dir", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("model", ["dit", "text"])
def test_unreadable_images_are_left_out_where_latents_are_made_of_them(home, tmp_path, capsys, model: str) -> None:
    shutil.copytree(home / "named", tmp_path / "damaged")
    for name in ("three", "five"):
        (tmp_path / "damaged" / name / "000.png").write_bytes(b"no picture")
    (tmp_path / "map.json").write_text(json.dumps({name: i for i, name in enumerate(NAMES)}))
    wanted = ["--forget-class", "3", "--class-map", str(tmp_path / "map.json")]
    if model == "text":
        wanted = ["--forget-prompt", "three", "--replace-prompt", "five"]
    wanted += ["--train-batch-size", "16", "--max-train-steps", "4"]
    own = ["--pretrained-model-name-or-path", str(home / model), "--data", str(tmp_path / "damaged"), *SMALL, *wanted]
    assert main(["forget", *own, "--output-dir", str(tmp_path / "strict"), "--strict"]) == 1
    assert "unreadable image" in capsys.readouterr().err
    assert not (tmp_path / "strict").exists()
    assert main(["forget", *own, "--output-dir", str(tmp_path / "out")]) == 0
    told = "".join(capsys.readouterr().out.split())
    assert "2imagescouldnotberead" in told and "three/000.png" in told and "five/000.png" in told
    assert len(result(tmp_path / "out")["unreadable"]) == 2


def test_latents_that_are_not_finite_are_found_before_anything_is_written(home, tmp_path, capsys) -> None:
    latents, labels = torch.randn(40, 4, 8, 8), torch.arange(10).repeat_interleave(4)
    latents[13, 0, 0, 0] = torch.nan  # of the forgotten class
    save_file({"latents": latents, "labels": labels}, tmp_path / "latents.safetensors")
    own = ["--pretrained-model-name-or-path", str(home / "dit"), "--data", str(tmp_path / "latents.safetensors")]
    own += ["--forget-class", "3", "--output-dir", str(tmp_path / "out"), *SMALL]
    assert main(["forget", *own]) == 1
    assert "sample 13" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_prompts_of_an_array_come_from_a_map(home: Path, tmp_path: Path, capsys) -> None:
    latents, labels = torch.randn(30, 4, 8, 8), torch.tensor([3, 5, 8]).repeat_interleave(10)
    save_file({"latents": latents, "labels": labels}, tmp_path / "latents.safetensors")
    own = ["--pretrained-model-name-or-path", str(home / "text"), "--data", str(tmp_path / "latents.safetensors")]
    own += ["--forget-prompt", "three", "--replace-prompt", "five", "--output-dir", str(tmp_path / "out"), *SMALL]
    assert main(["forget", *own]) == 1
    assert "the data have the label 3 and no prompt for it" in capsys.readouterr().err
    (tmp_path / "map.json").write_text(json.dumps({"3": "three", "5": "five", "8": "eight", "9": "nine"}))
    own += ["--class-map", str(tmp_path / "map.json")]
    assert main(["forget", *own]) == 1
    assert "there is no label '9' in the data" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "map.json").write_text(json.dumps({"3": "three", "5": "five", "8": "eight"}))
    assert main(["forget", *own]) == 0
    assert result(tmp_path / "out")["forgotten"] == ["three"]
    assert [row["count"] for row in result(tmp_path / "out")["mapping"]] == [10, 10, 10]


@pytest.mark.parametrize("replace", ["two", "a dog"])
def test_the_replacement_is_predicted_for_images_of_its_prompt_where_there_are_any(home, tmp_path, replace) -> None:
    wanted = {"forget_class": None, "forget_prompt": "three", "replace_prompt": replace}
    job = job_of(home, "text", tmp_path / "out", data=home / "named", **wanted)
    latents = job._encode(tmp_path / "latents")
    forget, retain = job._loaders(latents)
    samples = [latents[i] for i in range(len(latents))]
    folders = {label: name for name, label in job.data.folders.items()}
    twos = [sample["latent_mean"] for sample in samples if folders[int(sample["labels"])] == "two"]
    drawn = []
    for batch in forget:
        assert batch["prompts"] == ["three"] * 4 and batch["replace_prompts"] == [replace] * 4
        if replace == "two":
            means = batch["replace_latent_mean"]
            drawn += [[torch.equal(two, mean) for two in twos].index(True) for mean in means]
            assert not (means == batch["latent_mean"]).flatten(1).all(1).any()
        else:
            assert not any(name.startswith("replace_latent") for name in batch)
    assert sorted(set(drawn)) == (list(range(4)) if replace == "two" else [])
    assert all(name in ("latent_mean", "latent_std", "prompts") for batch in retain for name in batch)


def test_the_number_of_folders_must_be_the_models_or_a_map_given(home: Path, tmp_path: Path, capsys) -> None:
    save_digit_folders(tmp_path / "few", per_class=4, digits=(3, 5))
    own = ["--pretrained-model-name-or-path", str(home / "ddpm"), "--data", str(tmp_path / "few"), *SMALL]
    assert main(["forget", *own, "--forget-class", "3", "--output-dir", str(tmp_path / "out")]) == 1
    assert "2 class folders and the model 10 classes" in capsys.readouterr().err
    (tmp_path / "map.json").write_text(json.dumps({"3": 3, "5": 5}))
    own += ["--class-map", str(tmp_path / "map.json"), "--null-class"]
    assert main(["forget", *own, "--forget-class", "3", "--output-dir", str(tmp_path / "out")]) == 0
    assert [row["index"] for row in result(tmp_path / "out")["mapping"]] == [3, 5]


def test_a_model_without_a_null_class(home: Path, tmp_path: Path, capsys) -> None:
    """Ten embeddings and ten folders: a stray folder beside nine would look the same, and shift every label."""
    save_ddpm_pipeline(tmp_path / "model", classes=9)
    own = ["--pretrained-model-name-or-path", str(tmp_path / "model"), "--data", str(home / "digits"), *SMALL]
    own += ["--forget-class", "9", "--output-dir", str(tmp_path / "out")]
    assert main(["forget", *own]) == 1
    assert "has 10 class folders, as many as the model has class embeddings" in capsys.readouterr().err
    assert main(["forget", *own, "--no-null-class", "--guidance-scale", "3"]) == 1
    assert "--guidance-scale needs a null class" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["forget", *own, "--no-null-class"]) == 0
    assert "no null class" in capsys.readouterr().out
    found = result(tmp_path / "out")
    assert found["sampling"]["guidance"] is None and found["task"]["label_dropout"] == 0.0
    assert found["null_class"] is None


@pytest.mark.parametrize("options", [[], ["--no-null-class"]])
def test_a_model_of_two_classes(home: Path, tmp_path: Path, capsys, options: list[str]) -> None:
    save_ddpm_pipeline(tmp_path / "model", classes=1)
    save_digit_folders(tmp_path / "few", per_class=4, digits=(3, 5))
    own = ["--pretrained-model-name-or-path", str(tmp_path / "model"), "--data", str(tmp_path / "few"), *SMALL]
    (tmp_path / "map.json").write_text(json.dumps({"3": 0, "5": 1}))
    own += ["--class-map", str(tmp_path / "map.json"), "--output-dir", str(tmp_path / "out"), "--forget-class", "0"]
    assert main(["forget", *own, *options]) == (0 if options else 1)
    if not options:
        assert "2 class embeddings and the data hold 2 classes, up to 1: say with" in capsys.readouterr().err


def test_data_without_classes_are_asked_for_them_first(home: Path, tmp_path: Path, capsys) -> None:
    np.savez(tmp_path / "images.npz", images=np.zeros((4, 16, 16), np.uint8))
    own = ["--pretrained-model-name-or-path", str(home / "ddpm"), "--data", str(tmp_path / "images.npz"), *SMALL]
    assert main(["forget", *own, "--forget-class", "3", "--output-dir", str(tmp_path / "out")]) == 1
    assert "has no labels" in capsys.readouterr().err


@pytest.mark.parametrize("data", ["folders", "array"])
def test_whether_there_is_a_null_class_is_asked_where_the_data_do_not_tell(home, tmp_path, capsys, data: str) -> None:
    """Ten embeddings and the images of two classes: is the last embedding the 9, or no class?"""
    save_ddpm_pipeline(tmp_path / "model", classes=9)
    own = ["--pretrained-model-name-or-path", str(tmp_path / "model"), "--forget-class", "3", *SMALL]
    if data == "folders":
        save_digit_folders(tmp_path / "few", per_class=4, digits=(3, 9))
        (tmp_path / "map.json").write_text(json.dumps({"3": 3, "9": 9}))
        own += ["--data", str(tmp_path / "few"), "--class-map", str(tmp_path / "map.json")]
    else:
        digits = shared_digits.digits()
        chosen = torch.cat([(digits.labels == digit).nonzero().flatten()[:8] for digit in (3, 9)])
        images, labels = digits.pixels(16)[chosen], digits.labels[chosen]
        np.savez(tmp_path / "few.npz", images=images.numpy(), labels=labels.numpy())
        own += ["--data", str(tmp_path / "few.npz")]
    assert main(["forget", *own, "--output-dir", str(tmp_path / "out")]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "10 class embeddings and the data hold 2 classes, up to 9" in told
    assert "--null-class" in told and "--no-null-class" in told
    assert not (tmp_path / "out").exists()
    assert main(["forget", *own, "--output-dir", str(tmp_path / "out"), "--null-class"]) == 1  # and the 9 is it
    assert "the model has 9 classes" in " ".join(capsys.readouterr().err.split())
    assert main(["forget", *own, "--output-dir", str(tmp_path / "out"), "--no-null-class"]) == 0
    assert result(tmp_path / "out")["sampling"]["guidance"] is None


def test_the_null_class_of_a_dit_needs_no_option(home: Path, tmp_path: Path, capsys) -> None:
    assert run(home, "dit", tmp_path / "out", "--forget-class", "3", "--no-null-class") == 1
    assert "--null-class and --no-null-class are for a UNet2DModel" in " ".join(capsys.readouterr().err.split())
