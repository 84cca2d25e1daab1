"""``unlearn-ext forget`` from end to end, on small pipelines built from configurations and real digits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from helpers.forgetting import SMALL, hashes, plan_of, result, run, work
from helpers.pipelines import (
    save_digit_folders,
    save_model_and_scheduler,
)

from unlearn_ext.cli import main
from unlearn_ext.jobs.run import ForgetRun
from unlearn_ext.saliency import SaliencyMask


@pytest.fixture(scope="module")
def home(home: Path) -> Path:
    save_model_and_scheduler(home / "bare")
    return home


# --- Pipelines in, pipelines out ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "weights", "arguments"),
    [
        ("dit", "transformer/diffusion_pytorch_model.safetensors", ("--forget-class", "three")),
        pytest.param(
            *("ddpm", "unet/diffusion_pytorch_model.safetensors", ("--forget-class", "3, 7")), marks=pytest.mark.slow
        ),
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


def test_what_is_taken_otherwise_is_told(home: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(home / "ddpm", tmp_path / "ddpm")
    index = tmp_path / "ddpm" / "model_index.json"
    index.write_text(index.read_text().replace("DDPMPipeline", "MyPipeline"))
    arguments = ("--forget-class", "3", "--seed", "5")
    assert run(tmp_path, "ddpm", tmp_path / "out", *arguments, data=str(home / "digits")) == 0
    (note,) = result(tmp_path / "out")["notes"]
    assert note.startswith("model_index.json names the pipeline MyPipeline, which diffusers does not have")
    told = capsys.readouterr().out
    assert note in told.splitlines()
    assert "left out" not in told and not result(tmp_path / "out")["left_out"]
    mask = SaliencyMask.load(tmp_path / "out" / "unlearning" / "mask.safetensors")
    assert mask.metadata["seed"] == "5"


@pytest.mark.slow
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


@pytest.mark.slow
def test_reloaded_outputs_are_those_of_the_model_in_memory(home: Path, tmp_path: Path, monkeypatch) -> None:
    from unlearn_ext.jobs import output
    from unlearn_ext.models.pretrained import open_pretrained

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
    assert run(home, "dit", tmp_path / "out", "--forget-class", "3", "--keep-work") == 0
    manifest = json.loads((work(tmp_path / "out") / "latents" / "manifest.json").read_text())
    # Two batches of four from each set, of the four images of the forgotten digit and of the 36 others.
    assert len(manifest["indices"]) == 4 + 8
    assert result(tmp_path / "out")["seconds"]["encoding"] > 0


@pytest.mark.slow
def test_a_small_forget_set_is_measured_once(home: Path, tmp_path: Path) -> None:
    """However long the iterations and the other set are."""
    seen: dict[str, tuple[int, int | None]] = {}
    for given, measured in ((None, (1, 9)), (5, (1, 5))):  # of four images and of 36
        plan = plan_of(home, "ddpm", tmp_path / str(given), max_train_steps=3, fisher_batches=given)
        forget_run = ForgetRun(plan, lambda stage, done, total: seen.update({stage: (done, total)}))
        assert forget_run.run()["method"]["fisher_batches"] == measured == plan.fisher_batches
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
        assert main(["forget", *own, "--output-dir", str(out), *SMALL, "--forget-class", "3", "--keep-work"]) == 0
        assert work(out).is_dir() and not (work(out) / "latents").exists()


# --- Options --------------------------------------------------------------------------------------------------------


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


def test_trained_weights_are_chosen(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prompts = ("--forget-prompt", "three", "--replace-prompt", "two")
    assert run(home, "text", out, *prompts, "--trained-weights", "cross-attention", data="named") == 0
    weights = "unet/diffusion_pytorch_model.safetensors"
    old, new = load_file(home / "text" / weights), load_file(out / weights)
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved and all("attn2" in name for name in moved)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("--mixed-precision", "bf16"), ("--channels-last",), ("--gradient-checkpointing",)]
)
def test_ways_to_run(home: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    arguments = ("--forget-class", "3", "--gradient-accumulation-steps", "2", *options)
    assert run(home, "ddpm", tmp_path / "out", *arguments) == 0
    assert result(tmp_path / "out")["counts"]["forget_steps"] == 2
