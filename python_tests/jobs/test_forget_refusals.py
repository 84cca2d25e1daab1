"""What ``unlearn-ext forget`` refuses in one sentence, before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from helpers.forgetting import SMALL, result, run, unless_in
from helpers.pipelines import NAMES

from unlearn_ext.cli import main


def test_a_result_replaces_no_file_that_is_read(home: Path, tmp_path: Path, capsys) -> None:
    index = home / "ddpm" / "model_index.json"
    before = index.read_bytes()
    for more in ((), ("--dry-run",)):
        assert run(home, "ddpm", tmp_path / "out", "--forget-class", "3", "--json", str(index), *more) == 1
        assert f"--json: {index} is a file of" in capsys.readouterr().err
    assert index.read_bytes() == before and not (tmp_path / "out").exists()


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
        (
            "dit",
            ("--forget-class", "3", "--resume-from-checkpoint", "nowhere"),
            f"there is no checkpoint at {Path.cwd() / 'nowhere'}",
        ),
        ("dit", ("--forget-class", "3", "--num-inference-steps", "51"), "--num-inference-steps: expected at most 50"),
        ("dit", ("--forget-class", "3", "--classifier", "nowhere"), "--classifier: expected"),
        ("dit", ("--forget-class", "3", "--mixed-precision", "fp16"), "fp16 needs a GPU"),
        ("ddpm", ("--forget-class", "3", "--save-weights", "ema"), "needs --ema-decay"),
        ("dit", ("--forget-class", "3", "--trained-weights", "nothing"), "trained weights"),
        ("nowhere", ("--forget-class", "3"), "there is no folder"),
        ("dit", ("--forget-class", "3", "--max-train-steps", "0"), "--max-train-steps"),
        ("dit", ("--forget-class", "0,1,2,3,4,5,6,7,8,9"), "every class is to be forgotten"),
        ("dit", ("--forget-class", "3", "--dry-run", "--json", "{out}/x.json"), "x.json lies in --output-dir"),
        ("dit", ("--forget-class", "3", "--json", "{out}/model_index.json"), "model_index.json lies in --output-dir"),
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


@pytest.mark.parametrize("files", ["3/*.png", pytest.param("*/*.png", marks=pytest.mark.slow)])
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


@pytest.mark.slow
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
    own = ["--pretrained-model-name-or-path", str(home / model), "--data", str(tmp_path / "damaged")]
    own += [*unless_in(wanted, SMALL), *wanted]
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
