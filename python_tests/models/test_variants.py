"""What ``save_pretrained`` of diffusers and transformers writes is read, and a result opens in the same way."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import pipelines
from safetensors.torch import load_file

from unlearn_ext.errors import InputError
from unlearn_ext.models.judge import Judge
from unlearn_ext.models.pretrained import open_pretrained
from unlearn_ext.models.variants import DIFFUSERS, Weights, find_weights
from unlearn_ext.models.written import write_result

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

VARIANTS = (None, "non_ema", "fp16.v2")
FORMS = list(itertools.product(VARIANTS, ("10GB", "20KB"), (True, False)))
STEM = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return pipelines.save_text_pipeline(tmp_path_factory.mktemp("text") / "model")


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    return pipelines.save_model_and_scheduler(tmp_path_factory.mktemp("bare") / "model")


def same(a, b) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


def rewrite(home: Path, model, **settings) -> None:
    """The model's weights in another form."""
    for file in home.glob("*model*"):
        file.unlink()
    model.save_pretrained(home, **settings)


def as_transformers_wrote_them(home: Path, variant: str | None, sharded: bool) -> None:
    """Pickles, as transformers wrote them until its release 5."""
    end = "" if variant is None else f".{variant}"
    state = list(load_file(home / "model.safetensors").items())
    (home / "model.safetensors").unlink()
    parts = [state[::2], state[1::2]] if sharded else [state]
    names = [f"pytorch_model{end}-{i:05}-of-00002.bin" for i in (1, 2)] if sharded else [f"pytorch_model{end}.bin"]
    for name, part in zip(names, parts, strict=True):
        torch.save(dict(part), home / name)
    if sharded:
        weight_map = {key: name for name, part in zip(names, parts, strict=True) for key, _ in part}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (home / f"pytorch_model.bin.index{end}.json").write_text(json.dumps(index))


@pytest.mark.slow
@pytest.mark.parametrize("variant, shards, safe", FORMS)
def test_denoisers_in_every_form(bare, tmp_path, variant, shards, safe):
    source = Path(shutil.copytree(bare, tmp_path / "source"))
    model = diffusers.UNet2DModel.from_pretrained(bare)
    rewrite(source, model, variant=variant, max_shard_size=shards, safe_serialization=safe)
    if shards != "10GB":
        assert len(list(source.glob(f"*-of-*.{'safetensors' if safe else 'bin'}"))) > 1
    opened = open_pretrained(source)
    assert opened.variant == variant and same(opened.denoiser, model)
    with torch.no_grad():
        opened.denoiser.conv_in.weight.add_(1)
    write_result(source, opened, tmp_path / "output")
    assert not list((tmp_path / "output").glob("*.bin"))  # results are safetensors
    assert same(diffusers.UNet2DModel.from_pretrained(tmp_path / "output", variant=variant), opened.denoiser)
    again = open_pretrained(tmp_path / "output")
    assert again.variant == variant and same(again.denoiser, opened.denoiser)


@pytest.mark.parametrize("variant, shards, safe", FORMS)
def test_text_encoders_and_vaes_in_every_form(pipeline, tmp_path, variant, shards, safe):
    source = Path(shutil.copytree(pipeline, tmp_path / "source"))
    encoder = transformers.CLIPTextModel.from_pretrained(pipeline / "text_encoder")
    if safe:
        rewrite(source / "text_encoder", encoder, variant=variant, max_shard_size=shards)
    else:
        as_transformers_wrote_them(source / "text_encoder", variant, shards != "10GB")
    vae = diffusers.AutoencoderKL.from_pretrained(pipeline / "vae")
    rewrite(source / "vae", vae, variant=variant, max_shard_size=shards, safe_serialization=safe)
    opened = open_pretrained(source)
    assert opened.variant is None and same(opened.text_encoder, encoder) and same(opened.vae, vae)
    assert safe or opened.notes == (
        "weights of the VAE and the text encoder are pickles (.bin), read by torch as tensors alone, without their "
        "code; from_pretrained and save_pretrained make safetensors of them",
    )
    assert not safe or opened.notes == ()
    write_result(source, opened, tmp_path / "output")
    again = open_pretrained(tmp_path / "output")
    assert same(again.text_encoder, encoder) and same(again.vae, vae)


@pytest.mark.parametrize("variant, shards, safe", [form for form in FORMS if form[0] in (None, "non_ema")])
def test_classifiers_in_every_form(tmp_path, variant, shards, safe):
    model = pipelines.save_classifier(tmp_path)
    if safe:
        rewrite(tmp_path, model, variant=variant, max_shard_size="10KB" if shards != "10GB" else shards)
    else:
        as_transformers_wrote_them(tmp_path, variant, shards != "10GB")
    judge = Judge(tmp_path, dict(enumerate(pipelines.NAMES)), (3, 16, 16))
    assert same(judge.model, model) and (judge.note is None) == safe


def test_a_whole_pipeline_in_one_variant(pipeline, tmp_path):
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(pipeline)
    loaded.save_pretrained(tmp_path / "source", variant="fp16", max_shard_size="20KB")
    opened = open_pretrained(tmp_path / "source")
    with torch.no_grad():
        opened.denoiser.conv_in.weight.add_(1)
    write_result(opened.folder, opened, tmp_path / "output")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "output", variant="fp16")
    assert same(again.unet, opened.denoiser) and same(again.text_encoder, loaded.text_encoder)


def test_the_older_form_of_sharded_variants(bare, tmp_path):
    source = Path(shutil.copytree(bare, tmp_path / "source"))
    model = diffusers.UNet2DModel.from_pretrained(bare)
    rewrite(source, model, variant="fp16", max_shard_size="20KB")
    index = source / f"{STEM}.safetensors.index.fp16.json"
    content = json.loads(index.read_text())
    renamed = {
        name: name.replace(".fp16", "").replace(".safe", ".fp16.safe") for name in content["weight_map"].values()
    }
    for old, new in renamed.items():
        (source / old).rename(source / new)
    content["weight_map"] = {key: renamed[name] for key, name in content["weight_map"].items()}
    (source / f"{STEM}.safetensors.fp16.index.json").write_text(json.dumps(content))
    index.unlink()
    assert next(iter(renamed.values())).endswith("-00001-of-00012.fp16.safetensors")
    opened = open_pretrained(source)
    assert opened.variant == "fp16" and same(opened.denoiser, model)


# --- Which one is taken -------------------------------------------------------------------------------------


def files(home: Path, *names: str, **indices: list[str]) -> Path:
    (home / "config.json").write_text("{}")
    for name in names:
        (home / name).write_bytes(b"")
    for name, shards in indices.items():
        variant = "" if name == "plain" else f".{name}"
        index = {"weight_map": {str(i): shard for i, shard in enumerate(shards)}}
        (home / f"{STEM}.safetensors.index{variant}.json").write_text(json.dumps(index))
    return home


SHARD = f"{STEM}.fp16-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    "names, indices, expected",
    [
        ([f"{STEM}.bin", f"{STEM}.safetensors"], {}, Weights(None, True)),
        ([f"{STEM}.bin", f"{STEM}.fp16.safetensors"], {}, Weights("fp16", True)),
        ([f"{STEM}.bin", f"{STEM}.fp16.safetensors", f"{STEM}.ema.safetensors"], {}, Weights(None, False)),
        ([f"{STEM}.safetensors", SHARD], {"fp16": [SHARD]}, Weights(None, True)),
        ([f"{STEM}.fp16.safetensors", SHARD], {"fp16": [SHARD]}, Weights("fp16", True)),
        # A download of one variant brings every index along, but not the other's shards.
        ([SHARD], {"fp16": [SHARD], "plain": [f"{STEM}-00001-of-00001.safetensors"]}, Weights("fp16", True)),
    ],
)
def test_what_is_taken_where_there_is_more_than_one(tmp_path, names, indices, expected):
    assert find_weights(files(tmp_path, *names, **indices), "model", DIFFUSERS) == expected


@pytest.mark.parametrize(
    "names, indices, match",
    [
        ([SHARD], {}, f"has {SHARD} and no {STEM}.safetensors.index.json"),
        ([], {"plain": [SHARD]}, f"the weights of the model in .* lack {SHARD}: get the missing file"),
        ([], {"plain": ["../../secret.safetensors"]}, "which is not beside it"),
        ([], {"plain": []}, "has no weight_map"),
        ([f"{STEM}.a.safetensors", f"{STEM}.b.safetensors"], {}, "in the variants a and b: keep one"),
        ([f"{STEM}.a.bin", f"{STEM}.b.bin"], {}, "in the variants a and b: keep one"),
        ([], {}, f"has no weights: expected {STEM}.safetensors"),
    ],
)
def test_forms_that_are_refused(tmp_path, names, indices, match):
    with pytest.raises(InputError, match=match):
        find_weights(files(tmp_path, *names, **indices), "model", DIFFUSERS)


class Code:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("place, name", [("unet", f"{STEM}.bin"), ("text_encoder", "pytorch_model.bin")])
def test_code_in_a_pickle_does_not_run(pipeline, tmp_path, place, name):
    source = Path(shutil.copytree(pipeline, tmp_path / "source"))
    for file in (source / place).glob("*.safetensors"):
        file.unlink()
    torch.save({"conv_in.weight": Code(tmp_path / "ran")}, source / place / name)
    with pytest.raises(InputError, match="cannot be opened"):
        open_pretrained(source)
    assert not (tmp_path / "ran").exists()
