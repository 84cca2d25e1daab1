"""The classifier that judges what ``unlearn-ext forget`` has done, and those that cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from helpers.forgetting import result, run
from helpers.pipelines import NAMES, save_classifier


def test_a_classifier_judges(home: Path, tmp_path: Path, capsys) -> None:
    save_classifier(tmp_path / "judge", tuple(reversed(NAMES)))  # in another order than the model's
    options = ("--forget-class", "3", "--classifier", str(tmp_path / "judge"), "--samples", "2")
    assert run(home, "dit", tmp_path / "out", *options) == 3  # it sees no three before the run either
    verdict = result(tmp_path / "out")["verdict"]
    assert "not_seen_before" in result(tmp_path / "out")["warnings"]
    for when in ("before", "after"):
        assert list(verdict[when]["forgotten"]) == ["three"] and verdict[when]["forgotten"]["three"]["count"] == 2
        assert len(verdict[when]["retained"]) == 8
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if str(tmp_path) not in line]  # a path is not broken
    assert "three (forgotten)" in out and max(map(len, lines)) <= 80


def test_a_picture_may_be_taken_for_what_the_generator_does_not_know(tmp_path: Path) -> None:
    """Or two prompts judged by a thousand classes would get half of any noise right."""
    from unlearn_ext.evaluation.generated import class_scores
    from unlearn_ext.models.judge import Judge

    model = save_classifier(tmp_path, ("a cat", "noise", "a dog"))
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 5.0, 1.0]))
    model.save_pretrained(tmp_path)
    judge = Judge(tmp_path, {0: "A dog", 1: "a cat"}, (3, 16, 16))
    assert judge.columns == {0: 2, 1: 0}
    probabilities = judge.probabilities(torch.zeros(4, 3, 16, 16))
    scores = class_scores(probabilities, torch.tensor([2, 2, 0, 0]))
    assert {label: score["accuracy"] for label, score in scores.items()} == {0: 0.0, 2: 0.0}
    with torch.no_grad():
        judge.model.classifier.bias.copy_(torch.tensor([0.0, 0.5, 1.0]))
    scores = class_scores(judge.probabilities(torch.zeros(4, 3, 16, 16)), torch.tensor([2, 2, 0, 0]))
    assert {label: score["accuracy"] for label, score in scores.items()} == {0: 0.0, 2: 1.0}


def test_a_classifier_that_cannot_judge_is_refused_before_anything_is_done(home: Path, tmp_path: Path, capsys) -> None:
    """Of 16 x 16 pixels, and its image processor makes 224 x 224 of a picture."""
    from transformers import ViTImageProcessor

    save_classifier(tmp_path / "judge", [str(i) for i in range(10)])
    ViTImageProcessor().save_pretrained(tmp_path / "judge")
    for more in ([], ["--dry-run"]):
        options = ["--forget-class", "3", "--classifier", str(tmp_path / "judge"), *more]
        assert run(home, "ddpm", tmp_path / "out", *options) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: --classifier: ") and "cannot judge a picture of this model" in error
    assert not (tmp_path / "out").exists()


def test_a_classifier_that_fails_in_the_end_costs_no_result(home: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    from unlearn_ext.models.judge import Judge

    save_classifier(tmp_path / "judge", [str(i) for i in range(10)])
    probabilities = Judge.probabilities

    def fail(self, pictures):
        if len(pictures) > 1:
            raise RuntimeError("out of luck")
        return probabilities(self, pictures)

    monkeypatch.setattr(Judge, "probabilities", fail)
    options = ("--forget-class", "3", "--classifier", str(tmp_path / "judge"), "--samples", "1")
    assert run(home, "ddpm", tmp_path / "out", *options) == 3
    assert result(tmp_path / "out")["verdict"].startswith("not verified: the classifier failed on the pictures before")
    assert "out of luck" in capsys.readouterr().out


def test_classes_that_share_a_text_go_by_index_or_are_refused() -> None:
    from types import SimpleNamespace

    from unlearn_ext.errors import InputError
    from unlearn_ext.models.judge import _match

    config = SimpleNamespace(id2label={0: "crane", 1: "cat", 2: "crane"}, num_labels=3)
    assert _match({0: "crane", 1: "cat", 2: "crane"}, config) == [0, 1, 2]
    with pytest.raises(InputError, match="more than one class is called 'crane'"):
        _match({0: "cat", 1: "crane"}, config)
