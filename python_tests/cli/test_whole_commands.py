"""Each command from its options to its last line and its files, on little and in this process.

``forget`` has its own tests in ``python_tests/jobs``; that the numbers mean what they should is tested at full size.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import shared_digits
from helpers.digit_networks import measured
from safetensors import safe_open
from safetensors.torch import load_file

from unlearn_ext import SaliencyMask
from unlearn_ext.cli import main
from unlearn_ext.demo import settings
from unlearn_ext.demo.network import SmallResNet
from unlearn_ext.demo.training import train_classifier


def columns_but_for_paths(text: str, directory: Path) -> int:
    return max(len(line) for line in text.splitlines() if str(directory) not in line)


def test_profile(tmp_path: Path, capsys) -> None:
    arguments = ["--shapes", "2x320", "--rule", "sgd", "--repeats", "2", "--implementations", "loop,eager"]
    arguments += ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "rows.png")]
    assert main(["profile", *arguments]) == 0
    document = json.loads((tmp_path / "rows.json").read_text())
    assert [row["implementation"] for row in document["rows"]] == ["fused", "loop", "eager"]
    assert {(row["rule"], row["dtype"], row["weights"], row["tensors"]) for row in document["rows"]} == {
        ("sgd", "float32", 640, 2)
    }
    # float32: weights, one gradient and slow weights of 640 numbers each; 640 bits of mask
    sizes = document["memory"]["predicted_bytes"]
    assert (sizes["weights"], sizes["slow weights"], sizes["mask bits"]) == (2560, 2560, 80)
    passes = ["products", "forget_step", "products", "retain_step", "all"]
    assert [row["pass"] for row in document["passes"]] == passes
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "640 weights in 2 tensors" in printed and "forget step" in printed and "peak, all at once" in printed


def test_demo_of_the_classifier(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("unlearn_ext.demo.classifier.load_digits", shared_digits.digits)
    monkeypatch.setattr("unlearn_ext.demo.classifier._TEST_SIZE", 50)

    def train_briefly(model, images, labels, *, epochs, **options):
        return train_classifier(model, images, labels, epochs=1, **options)

    def two_iterations(scenario, update):
        return replace(settings.method_for(scenario, update), iterations=2, forget_freq=1)

    monkeypatch.setattr("unlearn_ext.demo.classifier.train_classifier", train_briefly)
    monkeypatch.setattr("unlearn_ext.demo.classifier.method_for", two_iterations)
    out = tmp_path / "out"
    arguments = ["--scenario", "random", "--train-size", "64", "--forget-fraction", "0.25"]
    code = main(["demo", *arguments, "--output-dir", str(out), "--json", str(tmp_path / "copy.json")])
    report = json.loads((out / "result.json").read_text())
    assert code == (3 if report["warnings"] else 0)
    assert report == json.loads((tmp_path / "copy.json").read_text())
    assert (report["scenario"], report["forget_size"], report["train_size"], report["test_size"]) == (
        "random", 16, 64, 50,
    )  # fmt: skip
    assert sorted(path.name for path in out.glob("[!.]*")) == [
        "mask.safetensors",
        "result.json",
        "unlearned.safetensors",
    ]
    assert SaliencyMask.load(out / "mask.safetensors").density == report["mask_density"]

    model = SmallResNet()  # what was written has the accuracy that was reported
    model.load_state_dict(load_file(out / "unlearned.safetensors"), strict=False)
    split = shared_digits.digits().split(64, 50, seed=0)
    assert measured(model, split.test_images, split.test_labels)[0] == report["models"]["unlearned"]["TA"]
    printed = capsys.readouterr().out
    assert "Forgetting 16 random digits of 64 training digits" in printed and str(out) in printed
    assert all(name in printed for name in ("original", "retrained", "unlearned"))
    assert columns_but_for_paths(printed, tmp_path) <= 80


def test_demo_of_diffusion(tmp_path: Path, capsys, monkeypatch) -> None:
    pytest.importorskip("diffusers")
    from unlearn_ext.demo.diffusion.settings import method_for

    monkeypatch.setattr("unlearn_ext.demo.diffusion.run.load_digits", shared_digits.digits)
    monkeypatch.setattr("unlearn_ext.demo.diffusion.judging.load_digits", shared_digits.digits)
    monkeypatch.setattr("unlearn_ext.demo.diffusion.judging.STEPS", 1)
    monkeypatch.setattr("unlearn_ext.demo.diffusion.run.BATCH_SIZE", 4)

    def method(task: str, **changes):
        return method_for(task, **{"iterations": 1, "fisher_batches": 1, **changes})

    monkeypatch.setattr("unlearn_ext.demo.diffusion.run.method_for", method)
    out = tmp_path / "out"
    arguments = ["--samples", "8", "--forget-class", "7", "--output-dir", str(out)]
    code = main(["demo", "text", *arguments])
    report = json.loads((out / "result.json").read_text())
    assert code == (3 if report["warnings"] else 0)
    assert report["task"] == "text" and report["forget_class"] == 7 and report["replacement"] == 6
    assert report["counts"]["iterations"] == 1 and set(report["digits"]) == set(map(str, range(10)))
    assert all(digit["after"]["count"] == 8 for digit in report["digits"].values())
    names = {"before-after.png", "mask.safetensors", "result.json", "scheduler", "text_encoder", "tokenizer", "unet"}
    assert {path.name for path in out.glob("[!.]*")} == names
    assert SaliencyMask.load(out / "mask.safetensors").density == report["mask_density"]
    with safe_open(out / "unet" / "diffusion_pytorch_model.safetensors", "pt") as weights:
        assert all(torch.isfinite(weights.get_tensor(name)).all() for name in weights.keys())  # noqa: SIM118
    printed = capsys.readouterr().out
    assert "forgets the digit 7, seed 0" in printed and "8 samples of each digit" in printed and str(out) in printed
    assert columns_but_for_paths(printed, tmp_path) <= 80


def test_compare(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("unlearn_ext.data.load_digits", shared_digits.digits)
    out = tmp_path / "out"
    arguments = ["--train-size", "40", "--held-out-size", "16", "--test-size", "40", "--epochs", "1"]
    arguments += ["--batch-size", "20", "--seeds", "1", "--settings", "published", "--cache-dir", str(tmp_path / "c")]
    arguments += ["--methods", "finetune:epochs=1", "--output-dir", str(out), "--json", str(tmp_path / "copy.json")]
    assert main(["compare", *arguments]) == 0
    report = json.loads((out / "result.json").read_text())
    assert report == json.loads((tmp_path / "copy.json").read_text())
    assert set(report) == {"command", "versions", "protocol", "methods", "noise_floor", "references"}
    assert report["protocol"]["train_size"] == 40 and report["protocol"]["sizes"]["forget"] == 8
    (row,) = report["methods"].values()
    (run,) = (out / "runs").glob("seed0-finetune*.json")  # a table over one seed has that seed's numbers
    assert not row["failed"] and row["FA"]["values"] == [json.loads(run.read_text())["record"]["metrics"]["FA"]]
    printed = capsys.readouterr().out
    assert "finetune" in printed and "retrained" in printed and str(out / "result.json") in printed
    assert columns_but_for_paths(printed, tmp_path) <= 80
