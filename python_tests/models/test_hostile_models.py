"""Model folders whose files are broken, deep, or of wrong types: each is one sentence of the project's own."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from helpers import pipelines

from unlearn_ext.errors import InputError
from unlearn_ext.jobs.prompts import read_prompts
from unlearn_ext.models.judge import Judge
from unlearn_ext.models.pretrained import open_pretrained

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


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return pipelines.save_dit_pipeline(tmp_path_factory.mktemp("dit") / "model")


def test_label_texts_as_they_can_be_used(dit, tmp_path):
    source = Path(shutil.copytree(dit, tmp_path / "source"))

    def opened(value):
        edit(source / "model_index.json", id2label=value)
        found = open_pretrained(source)
        return found.id2label, found.notes

    texts = dict(enumerate(pipelines.NAMES))
    assert opened(list(pipelines.NAMES)) == opened({str(i): texts[i] for i in reversed(range(10))}) == (texts, ())
    assert opened(None) == opened({}) == opened([]) == ({}, ())
    assert opened([*pipelines.NAMES, "none of them"]) == (texts, ())  # of the null class
    found, (note,) = opened({"9": "nine", "0": "zero", "4": " "})
    assert list(found.items()) == [(0, "zero"), (9, "nine")]
    assert note == "id2label has texts for 2 of 10 classes: 1 and others without one go by their number"
    assert opened(list(pipelines.NAMES[:9]))[1] == ("id2label has no text for class 9: it goes by its number",)


@pytest.mark.parametrize(
    "value, match",
    [
        ({"1" * 5000: "x"}, "has the key '1{100}', which is none of the classes 0 to 9: correct id2label there"),
        ({"-1": "y"}, "has the key '-1', which is none"),
        ({"11": "y"}, "has the key '11', which is none"),
        ({"03": "three"}, "has the key '03', which is none"),
        ({"three": 3}, "has the key 'three', which is none"),
        ({"3": ["three"]}, "of class 3, which is no text"),
        ({"labels": {"3": "three"}}, "has the key 'labels'"),
        ([["3", "three"]], "of class 0, which is no text"),
        ([str(i) for i in range(12)], "has the key '11'"),
        ("zero, one", "id2label is 'zero, one', expected an object"),
        (7, "id2label is '7', expected"),
    ],
)
def test_label_texts_of_the_wrong_kind(dit, tmp_path, value, match):
    source = Path(shutil.copytree(dit, tmp_path / "source"))
    edit(source / "model_index.json", id2label=value)
    refused(open_pretrained, source, match=match)


def test_a_key_that_stands_there_twice(dit, tmp_path):
    source = Path(shutil.copytree(dit, tmp_path / "source"))
    index = source / "model_index.json"
    index.write_text(index.read_text().replace('"4": "four"', '"3": "four"'))
    refused(open_pretrained, source, match="model_index.json cannot be read .it has the key '3' twice.")


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
