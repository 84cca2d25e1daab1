"""Whether ``unlearn-ext forget`` did what it was asked to: sentences, warnings in the result, and exit code 3."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from helpers.forgetting import hashes, result, run
from helpers.pipelines import save_classifier

from unlearn_ext.cli import main
from unlearn_ext.jobs.unmet import judged_warnings, still_drawn
from unlearn_ext.models.judge import Judge


@pytest.fixture(scope="module")
def home(home: Path) -> Path:
    save_classifier(home / "judge", [str(i) for i in range(10)])
    return home


@pytest.mark.parametrize(
    ("before", "after", "still"),
    [
        (1.0, 1.0, True),
        (1.0, 0.51, True),
        (1.0, 0.5, False),
        (1.0, 0.0, False),
        (0.0, 0.0, False),
        (0.0, 0.5, True),
        (0.12, 0.1, False),  # what a classifier gets right that does not look
        (0.15, 0.14, True),
    ],
)
def test_what_counts_as_still_drawn(before: float, after: float, still: bool) -> None:
    assert still_drawn(before, after, 0.1) == still


def verdict(forgotten: tuple[float, float], *retained: tuple[float, float]) -> dict:
    return {
        when: {
            "forgotten": {"3": {"accuracy": forgotten[i]}},
            "retained": {str(n): {"accuracy": pair[i]} for n, pair in enumerate(retained)},
        }
        for i, when in enumerate(("before", "after"))
    }


@pytest.mark.parametrize(
    ("found", "keys"),
    [
        (verdict((1.0, 0.0), (1.0, 0.9), (0.8, 0.9)), set()),
        (verdict((1.0, 1.0), (1.0, 0.9)), {"still_drawn"}),
        (verdict((0.1, 0.1), (1.0, 1.0)), {"not_seen_before"}),
        (verdict((1.0, 0.0), (1.0, 0.2), (1.0, 0.5)), {"retained_lost"}),
        (verdict((1.0, 0.0), (1.0, 0.0), (1.0, 1.0)), set()),  # their mean counts
        (verdict((1.0, 0.9), (1.0, 0.0)), {"still_drawn", "retained_lost"}),
        (verdict((1.0, 0.0), (0.1, 0.0)), set()),  # the classifier did not know it
        ("not verified: 3 of 9 pictures after hold inf or NaN", {"not_judged"}),
    ],
)
def test_what_a_verdict_warns_of(found, keys) -> None:
    warnings = judged_warnings(found, 10)
    assert warnings.keys() == keys and all(len(sentence.splitlines()) == 1 for sentence in warnings.values())


def judge_says(monkeypatch, *rounds: int) -> None:
    """Each picture of a time is of the class; the classifier is tried once before."""
    answers = iter([0, *rounds])

    def probabilities(self, pictures, batch_size=32):
        return torch.nn.functional.one_hot(torch.full((len(pictures),), next(answers)), 10).float()

    monkeypatch.setattr(Judge, "probabilities", probabilities)


@pytest.mark.parametrize(
    ("rounds", "code"),
    [
        ((3, 3), 3),
        ((3, 4), 0),
        pytest.param((4, 3), 3, marks=pytest.mark.slow),
        pytest.param((4, 4), 3, marks=pytest.mark.slow),
    ],
)
def test_a_class_still_drawn_or_never_seen_ends_with_code_3(home, tmp_path, monkeypatch, capsys, rounds, code) -> None:
    judge_says(monkeypatch, *rounds)
    options = ("--forget-class", "3", "--classifier", str(home / "judge"), "--samples", "1")
    assert run(home, "ddpm", tmp_path / "out", *options) == code
    warnings = result(tmp_path / "out")["warnings"]
    assert ("still_drawn" in warnings) == (rounds[1] == 3) and ("not_seen_before" in warnings) == (rounds == (4, 4))
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("exit code 3: ") == (code == 3)
    assert ("not forgotten: the classifier still sees 3" in last) == (rounds[1] == 3)
    assert (tmp_path / "out" / "model_index.json").exists()


# --- Several classes and prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [["3", "5"], ["5, 3"], ["3,5", "3"], ["5", " 3 "]])
def test_an_option_given_again_forgets_both(home: Path, tmp_path: Path, given) -> None:
    words = [word for value in given for word in ("--forget-class", value)]
    paths = ["--pretrained-model-name-or-path", str(home / "ddpm"), "--data", str(home / "digits")]
    plan = tmp_path / "plan.json"
    out = ["--output-dir", str(tmp_path / "out"), "--dry-run", "--json", str(plan)]
    assert main(["forget", *paths, *words, *out, "--max-train-steps", "2", "--train-batch-size", "4"]) == 0
    assert set(json.loads(plan.read_text())["forget_classes"]) == {3, 5}


def test_two_classes_are_in_the_result_and_not_in_the_retain_set(home: Path, tmp_path: Path) -> None:
    assert run(home, "ddpm", tmp_path / "out", "--forget-class", "5", "--forget-class", "3") == 0
    found = result(tmp_path / "out")
    assert set(found["forgotten"]) == {"3", "5"} and found["options"]["forget_class"] == ["5", "3"]
    assert "still_drawn" not in found["warnings"]  # without a classifier nothing is said
    assert run(home, "ddpm", tmp_path / "one", "--forget-class", "5,3") == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "one")
    assert result(tmp_path / "one")["options"]["forget_class"] == "5,3"


def test_two_prompts_are_forgotten_and_both_replaced(home: Path, tmp_path: Path, capsys) -> None:
    prompts = ("--forget-prompt", "five", "--forget-prompt", "three")
    out = tmp_path / "out"
    assert run(home, "text", out, *prompts, "--replace-prompt", "two", data="named") == 0
    found, told = result(out), capsys.readouterr().out
    assert set(found["forgotten"]) == {"three", "five"} and found["options"]["forget_prompt"] == ["five", "three"]
    assert {line.split()[5] for line in told.splitlines() if line.startswith("│ forget")} == {"three", "five"}
    for second, words in (("six!", "no folder belongs to 'six!'"), ("two", "expected another prompt than the one")):
        again = (*prompts, "--forget-prompt", second, "--replace-prompt", "two")
        assert run(home, "text", tmp_path / "x", *again, data="named") == 1
        assert words in capsys.readouterr().err
