"""Tokenizers of text-conditional folders: opened as the class that they are of, or refused."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import pipelines
from helpers.opening import edit, refused

from unlearn_ext.models.pretrained import open_pretrained

pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def word_tokenizer(folder: Path, length: int = 8, **tokens: str):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<unk>", *pipelines.NAMES]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=length, unk_token="<unk>", **{"pad_token": "<pad>", **tokens}
    )
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def ids(tokenizer, text):
    return tokenizer(text, padding="max_length", truncation=True).input_ids


@pytest.mark.parametrize("index", ["its class", "an alias", "none"])
def test_the_tokenizer_is_of_its_own_class(copy, index):
    source = copy("text")
    tokenizer = word_tokenizer(source / "tokenizer")
    name = {"its class": type(tokenizer).__name__, "an alias": "PreTrainedTokenizerFast"}.get(index)
    if name is None:
        (source / "model_index.json").unlink()
    else:
        edit(source / "model_index.json", tokenizer=["transformers", name])
    opened = open_pretrained(source).tokenizer
    assert all(ids(opened, name) == ids(tokenizer, name) for name in pipelines.NAMES)
    assert ids(opened, "three") != ids(opened, "two")


def test_a_pipeline_and_its_tokenizer_must_agree(copy):
    source = copy("text")
    word_tokenizer(source / "tokenizer")
    refused("is a CLIPTokenizer by the pipeline's model_index.json and a .* by its own", open_pretrained, source)


@pytest.mark.parametrize("config", ["kept", "of the fast class", "absent"])
def test_tokenizers_of_clip(copy, built, config):
    source = copy("text")
    shutil.rmtree(source / "tokenizer")
    pipelines.save_tokenizer(source / "tokenizer")
    if config != "absent":
        name = "CLIPTokenizerFast" if config != "kept" else "CLIPTokenizer"
        (source / "tokenizer" / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": name, "model_max_length": 10**30})
        )
    opened, before = (open_pretrained(folder).tokenizer for folder in (source, built["text"]))
    assert opened("three two").input_ids == before("three two").input_ids


@pytest.mark.parametrize(
    "change, match",
    [
        ({"pad_token": None}, "has no padding token"),
        ({"tokenizer_class": "Nothing"}, "is a Nothing, which this transformers does not have|correct one"),
        ({"tokenizer_class": ["CLIPTokenizer"]}, "which this transformers does not have"),
        ({"added_tokens_decoder": 3}, "the tokenizer in .* cannot be opened"),
    ],
)
def test_tokenizers_that_are_refused(copy, change, match):
    source = copy("text")
    (source / "model_index.json").unlink()
    word_tokenizer(source / "tokenizer")
    edit(source / "tokenizer" / "tokenizer_config.json", **change)
    refused(match, open_pretrained, source)


def test_a_tokenizer_of_more_words_than_the_encoder_knows(copy):
    source = copy("text")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(source / "tokenizer")
    tokenizer.add_tokens(["<my-cat>"])
    tokenizer.save_pretrained(source / "tokenizer")
    refused("tokens and the text encoder embeddings of", open_pretrained, source)
