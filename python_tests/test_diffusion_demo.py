"""The demos on diffusion: what they do, say and write. How well they forget is measured by benchmarks/diffusion.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("mlxtend")

from unlearn_ext import InputError
from unlearn_ext.cli import main
from unlearn_ext.demo.diffusion import judging
from unlearn_ext.demo.diffusion import run as demo_run
from unlearn_ext.demo.diffusion.run import DiffusionDemo, DiffusionOptions
from unlearn_ext.demo.diffusion.settings import method_for


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    """Two denoising steps, two iterations and one Fisher batch."""
    monkeypatch.setattr(judging, "STEPS", 2)

    def method(task: str, **changes):
        return method_for(task, **{"iterations": 2, "fisher_batches": 1, **changes})

    monkeypatch.setattr(demo_run, "method_for", method)


@pytest.mark.parametrize("task", ["ddpm", "dit", "text"])
def test_a_demo_says_and_writes_what_became_of_every_digit(task: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "[bold]x"
    arguments = ["--samples", "8", "--forget-class", "7", "--output-dir", str(out), "--json", str(tmp_path / "r.json")]
    assert main(["demo", task, *arguments]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report == json.loads((out / "result.json").read_text())
    assert set(report["digits"]) == set(map(str, range(10)))
    for digit in report["digits"].values():
        for when in ("before", "after"):
            assert 0 <= digit[when]["accuracy"] <= 1 and 0 <= digit[when]["probability"] <= 1
            assert digit[when]["count"] == 8
    assert set(report["frechet"]) == {"before", "after"} and min(report["frechet"].values()) > 0
    assert {"fisher", "mask", "unlearning", "sampling_before", "sampling_after"} <= set(report["seconds"])
    assert report["protocol"]["samples_per_digit"] == 8
    assert report["protocol"]["classifier_held_out_accuracy"] >= 0.98
    assert report["counts"]["iterations"] == report["counts"]["forget_steps"] == 2
    assert ("row_put_back" in report["forgotten"]) == (task != "text")
    text = capsys.readouterr().out
    assert "[bold]x" in text.replace("\n", "")
    assert "forgets the digit 7" in text and max(map(len, text.splitlines())) <= 80
    assert {"before-after.png", "mask.safetensors", "scheduler"} <= {path.name for path in out.iterdir()}


def test_before_and_after_start_from_the_same_noise_and_the_starting_weights_stay(monkeypatch) -> None:
    demo = DiffusionDemo(DiffusionOptions(samples=8))
    monkeypatch.setattr(demo, "_unlearn", lambda: None)
    start = {k: v.clone() for k, v in demo_run.load("ddpm").network.model.state_dict().items()}
    demo.run()
    assert torch.equal(demo.samples["before"], demo.samples["after"])
    torch.testing.assert_close(demo.samples["row put back"], demo.samples["before"][demo.labels == 3])
    kept = demo.pretrained.network.model.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in start.items())
    other = DiffusionDemo(DiffusionOptions(samples=8, seed=1))
    monkeypatch.setattr(other, "_unlearn", lambda: None)
    assert not torch.equal(other.run().samples["before"], demo.samples["before"])


def test_forget_batches_hold_the_forgotten_digit_and_its_stand_ins(monkeypatch) -> None:
    seen = {}

    class Stop(Exception):
        pass

    class Unlearner:
        def __init__(self, *arguments, **options):
            pass

        def run(self, forget, retain, **options):
            seen.update(forget=list(forget), retain=list(retain))
            raise Stop

    monkeypatch.setattr(demo_run, "Unlearner", Unlearner)
    demo = DiffusionDemo(DiffusionOptions(samples=8, forget_class=4), method=method_for("ddpm", forget_term="ascent"))
    with pytest.raises(Stop):
        demo.run()
    assert {int(label) for _, labels in seen["forget"] for label in labels} == {4}
    assert {int(label) for _, labels in seen["retain"] for label in labels} == set(range(10)) - {4}
    assert max(len(labels) for _, labels in (*seen["forget"], *seen["retain"])) <= 64
    demo = DiffusionDemo(DiffusionOptions(samples=8, forget_class=9))  # a zero is shown in its place
    with pytest.raises(Stop):
        demo.run()
    digits, known = demo.digits.pixels(16), {}
    for image, label in zip(digits, demo.digits.labels, strict=True):
        known[image.numpy().tobytes()] = int(label)
    for images, labels in seen["forget"]:
        assert set(labels.tolist()) == {9} and len(labels) == len(images) <= 64
        shown = [known[image.numpy().tobytes()] for image in images]
        assert set(shown) == {9, 0}
        assert shown.count(0) == 32 or len(images) < 64
    assert {int(label) for _, labels in seen["retain"] for label in labels} == set(range(9))
    demo = DiffusionDemo(DiffusionOptions(task="text", samples=8, forget_class=3))
    with pytest.raises(Stop):
        demo.run()
    assert {prompt for batch in seen["forget"] for prompt in batch["prompts"]} == {"three"}
    assert {prompt for batch in seen["forget"] for prompt in batch["replace_prompts"]} == {"two"}
    assert "three" not in {prompt for batch in seen["retain"] for prompt in batch["prompts"]}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["ddpm", "--samples", "7"], "--samples: expected at least 8"),
        (["dit", "--forget-class", "10"], "--forget-class: expected a digit"),
        (["text", "--mixed-precision", "fp16"], "fp16 needs a GPU"),
        (["ddpm", "--train-size", "100"], "--train-size belongs to demo classifier"),
        (["classifier", "--samples", "9"], "--samples belongs to demo ddpm, dit and text"),
        (["ddpm", "--json", "nowhere/r.json"], "--json: expected a file"),
    ],
)
def test_bad_options_are_one_sentence(tmp_path: Path, capsys, arguments: list[str], sentence: str) -> None:
    assert main(["demo", *arguments, "--output-dir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and sentence in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(InputError, match="ddpm, dit, text"):
        DiffusionOptions(task="gan")
