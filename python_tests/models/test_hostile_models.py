"""Model folders whose files are broken, deep, or of wrong types: each is one sentence of the project's own."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from helpers import pipelines

from unlearn_ext.diffusion.judge import Judge
from unlearn_ext.diffusion.pretrained import open_pretrained
from unlearn_ext.diffusion.prompts import read_prompts
from unlearn_ext.errors import InputError

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

WEIGHTS = "diffusion_pytorch_model.safetensors"
DEEP = "[" * 100_000 + "]" * 100_000
BROKEN = {
    "empty": b"",
    "half": b'{"_class_name": "UNet',
    "deep": b'{"_class_name": ' + DEEP.encode() + b"}",
    "digits": b'{"sample_size": ' + b"1" * 5000 + b"}",
    "a list": b"[1, 2]",
    "null": b"null",
    "bytes": bytes(range(256)),
    "not UTF-8": b'{"_class_name": "\xff\xfe"}',
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return pipelines.save_text_pipeline(tmp_path_factory.mktemp("text") / "model")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return pipelines.save_model_and_scheduler(tmp_path_factory.mktemp("bare") / "model")


@pytest.fixture
def copy(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "source"))


def refused(action, *args, match=None):
    with pytest.raises(InputError, match=match) as caught:
        action(*args)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize(
    "name",
    ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
     "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"],
)  # fmt: skip
def test_configurations_that_are_broken(copy, name, content):
    (copy / name).write_bytes(BROKEN[content])
    refused(open_pretrained, copy)


@pytest.mark.parametrize("name", ["tokenizer/vocab.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("content", ["empty", "half", "deep", "a list", "null", "bytes"])
def test_tokenizers_that_are_broken(copy, name, content):
    (copy / name).write_bytes(BROKEN[content])
    if name == "tokenizer/vocab.json":  # it is read where there is no tokenizer.json
        (copy / "tokenizer" / "tokenizer.json").unlink()
        (copy / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    refused(open_pretrained, copy)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("model_index.json", {"unet": [["diffusers"], {"a": 1}]}),
        ("model_index.json", {"unet": "UNet2DConditionModel"}),
        ("model_index.json", {"scheduler": ["diffusers", "UNet2DModel"]}),
        ("scheduler/scheduler_config.json", {"beta_end": [1, 2]}),
        ("model_index.json", {"tokenizer": ["transformers", "AutoTokenizer"]}),
        ("unet/config.json", {"_class_name": ["UNet2DConditionModel"]}),
        ("unet/config.json", {"_class_name": "os"}),
        ("unet/config.json", {"block_out_channels": 5}),
        ("unet/config.json", {"block_out_channels": [8, -16]}),
        ("unet/config.json", {"layers_per_block": 10**9}),
        ("unet/config.json", {"cross_attention_dim": 10**12}),
        ("unet/config.json", {"norm_num_groups": 0}),
        ("unet/config.json", {"norm_num_groups": "four"}),
        ("unet/config.json", {"down_block_types": ["__import__", "CrossAttnDownBlock2D"]}),
        ("unet/config.json", {"in_channels": None}),
        ("vae/config.json", {"_class_name": {"a": 1}}),
        ("vae/config.json", {"latent_channels": "four"}),
        ("vae/config.json", {"scaling_factor": "x"}),
        ("vae/config.json", {"scaling_factor": -1}),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}),
        ("text_encoder/config.json", {"hidden_size": 17}),
        ("text_encoder/config.json", {"architectures": [{"a": 1}]}),
        ("text_encoder/config.json", {"vocab_size": -3}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}),
        ("scheduler/scheduler_config.json", {"beta_start": "x"}),
        ("scheduler/scheduler_config.json", {"trained_betas": "abc"}),
        ("scheduler/scheduler_config.json", {"prediction_type": ["epsilon"]}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}),
    ],
)
def test_values_of_the_wrong_kind(copy, name, changes):
    edit(copy / name, **changes)
    refused(open_pretrained, copy)


def test_label_texts_of_the_wrong_kind(tmp_path):
    folder = pipelines.save_dit_pipeline(tmp_path / "dit")
    edit(folder / "model_index.json", id2label={"0": "zero", "1" * 5000: "x", "-1": "y", "3": ["three"], "9": "nine"})
    assert open_pretrained(folder).id2label == {0: "zero", 9: "nine"}
    edit(folder / "model_index.json", id2label=["zero"])
    assert open_pretrained(folder).id2label == {}


def header(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        header(b"{"),
        header(b"[" * 50_000),
        header(b'{"a": {"dtype": "F32", "shape": [1' + b"0" * 5000 + b'], "data_offsets": [0, 4]}}'),
        header(b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 4]}}') + bytes(4),
        header(b'{"conv_in.weight": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}') + bytes(1),
        struct.pack("<Q", 1 << 62) + b"{}",
    ],
)
@pytest.mark.parametrize("place, name", [("unet", WEIGHTS), ("text_encoder", "model.safetensors")])
def test_weights_whose_headers_are_broken(copy, place, name, content):
    (copy / place / name).write_bytes(content)
    refused(open_pretrained, copy, match="(denoiser|text encoder) in")


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_classifiers_that_are_broken(tmp_path, name, content):
    pipelines.save_classifier(tmp_path)
    (tmp_path / name).write_bytes(BROKEN[content])
    refused(Judge, tmp_path, dict(enumerate(pipelines.NAMES)), (3, 16, 16), match="--classifier")


def test_a_classifier_that_brings_code(tmp_path):
    pipelines.save_classifier(tmp_path)
    edit(tmp_path / "config.json", auto_map={"AutoModelForImageClassification": "mine.Model"}, model_type="mine")
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
    refused(Judge, tmp_path, dict(enumerate(pipelines.NAMES)), (3, 16, 16), match="--classifier")


# --- Prompts ------------------------------------------------------------------------------------------------


class Folders:
    """What is asked of the data."""

    def __init__(self, *names: str):
        self.folders = {name: i for i, name in enumerate(names)}


@pytest.mark.parametrize(
    "text, match",
    [
        (DEEP, "is no JSON of folders and prompts"),
        ('{"a": ' + "1" * 5000 + "}", "is no JSON"),
        ('[["a", "b"]]', "is no JSON"),
        ('{"a": "cat", "a": "dog"}', "names the folder 'a' twice"),
        ('{"a": "\\ud800"}', "is no text that can be a prompt"),
        ('{"absent": "cat"}', "no folder 'absent'"),
    ],
)
def test_maps_of_prompts_that_are_refused(tmp_path, text, match):
    (tmp_path / "map.json").write_text(text)
    refused(read_prompts, Folders("a", "b"), tmp_path / "map.json", "b", "c", match=match)


def test_prompts_in_both_forms_of_unicode(tmp_path):
    one, two = "caf\u00e9", "cafe\u0301"
    for folder, typed in ((one, two), (two, one)):
        concepts = read_prompts(Folders(folder, "b"), None, [typed], "tea")
        assert concepts.forget == [0] and concepts.prompts[0] == one
        (tmp_path / "map.json").write_text(json.dumps({typed: "b"}))
        assert read_prompts(Folders(folder, "c"), tmp_path / "map.json", ["c"], two).prompts == {0: "b", 1: "c"}


def test_a_folder_of_other_bytes_is_no_prompt():
    refused(read_prompts, Folders("b", "caf\udce9"), None, "b", "c", match="rename the folder")


# --- Anything -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "scheduler/scheduler_config.json", WEIGHTS])
def test_mutated_folders_are_opened_or_refused(bare, tmp_path, name):
    source = Path(shutil.copytree(bare, tmp_path / "source"))
    content, rng = (source / name).read_bytes(), np.random.default_rng(3)
    reach = min(len(content), 4000)  # of weights: the header
    for _ in range(150):
        changed = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(reach))
            changed[at : at + int(rng.integers(0, 3))] = rng.choice([b"", b"9", b"[", b'"', b"null", rng.bytes(1)])
        (source / name).write_bytes(changed)
        try:
            open_pretrained(source)
        except InputError as error:
            assert "\n" not in str(error)
