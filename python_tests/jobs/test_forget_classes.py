"""Classes and prompts of ``unlearn-ext forget``: maps, replacements, and whether a model has a null class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import shared_digits
from safetensors.torch import save_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from helpers.forgetting import SMALL, plan_of, result, run
from helpers.pipelines import save_ddpm_pipeline, save_digit_folders

from unlearn_ext.cli import main
from unlearn_ext.jobs.run import ForgetRun


@pytest.mark.slow
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
    plan = plan_of(home, "text", tmp_path / "out", data=home / "named", **wanted)
    whole_run = ForgetRun(plan)
    latents = whole_run._encode(tmp_path / "latents")
    forget, retain = whole_run._loaders(latents)
    samples = [latents[i] for i in range(len(latents))]
    folders = {label: name for name, label in plan.data.folders.items()}
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


@pytest.mark.parametrize("data", [pytest.param("folders", marks=pytest.mark.slow), "array"])
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
