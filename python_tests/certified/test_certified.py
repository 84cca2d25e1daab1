"""Certified deletion: streams of deletions, what cannot be certified, features, and the word itself."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.certifying import MODEL, unit_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from unlearn_ext.certified import DescentToDelete, SoftmaxRegression, certify, unit_rows
from unlearn_ext.errors import InputError


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return unit_digits()


@pytest.fixture
def learner(digits: tuple[Tensor, ...]) -> DescentToDelete:
    return certify(MODEL, digits[0], digits[2], iterations=25)


# --- Deletions ----------------------------------------------------------------------------------------------


def test_going_on_from_a_file_is_going_on(digits: tuple[Tensor, ...], learner: DescentToDelete, tmp_path: Path) -> None:
    x, _, y, _ = digits
    learner.delete([5, 2])
    learner.publish()
    learner.save_secret(tmp_path / "secret.safetensors")
    left = torch.tensor(learner.remaining)
    again = DescentToDelete.load_secret(tmp_path / "secret.safetensors", x[left], y[left])
    assert again.constants == learner.constants and again.publications == 1
    for one in (learner, again):
        one.delete([1, 900])
    assert torch.equal(again._secret.weights, learner._secret.weights)
    assert again.remaining == learner.remaining and 5 not in again.remaining
    with pytest.raises(InputError, match="sample 5 has been deleted already"):
        again.delete(5)
    for rows, labels in ((x, y), (x[left].flip(0), y[left].flip(0)), (x[left], (y[left] + 1) % 10)):
        with pytest.raises(InputError, match="belongs to other data: pass the 1435 rows and labels"):
            DescentToDelete.load_secret(tmp_path / "secret.safetensors", rows, labels)


def test_files_that_are_no_secret(digits: tuple[Tensor, ...], learner: DescentToDelete, tmp_path: Path) -> None:
    x, _, y, _ = digits
    learner.publish().save(tmp_path)
    (tmp_path / "text").write_text("no")
    for name, message in (
        ("none", "there is no secret state"),
        ("weights.safetensors", "is not a secret state"),
        ("text", "is damaged"),
    ):
        with pytest.raises(InputError, match=message):
            DescentToDelete.load_secret(tmp_path / name, x, y)


@pytest.mark.parametrize(
    "indices, message",
    [
        ([], "expected at least one sample number, got none"),
        (2000, "there is no sample 2000: they are numbered from 0 to 1436"),
        (-1, "there is no sample -1"),
        ([4, 3], "sample 3 has been deleted already"),
        ([8, 8], "sample 8 is given twice"),
        (1.0, "expected sample numbers, got 1.0"),
        (True, "expected sample numbers, got True"),
        ("3", "expected sample numbers, got '3'"),
        (None, "expected sample numbers, got None"),
        (torch.tensor([[4, 5]]), r"expected sample numbers, got \[4, 5\]"),
        (torch.tensor([True, False]), "expected sample numbers, got True"),
        (range(700, 1437), "half of the 1437 samples are left, so 718 can be deleted, and 1 are: train anew"),
        ([i for i in range(1437) if i != 3], "that would delete every sample and leave nothing to train on"),
    ],
)
def test_deletions_that_are_refused(learner: DescentToDelete, indices: object, message: str) -> None:
    learner.delete(3)
    before, weights = learner.remaining, learner._secret.weights.clone()
    with pytest.raises(InputError, match=f"^delete: .*{message}"):
        learner.delete(indices)
    assert learner.remaining == before and torch.equal(learner._secret.weights, weights)


@pytest.mark.parametrize("indices", [[4, 9], (9, 4), {4, 9}, torch.tensor([4, 9]), np.array([4, 9], dtype=np.uint8)])
def test_several_at_once_in_any_form(digits: tuple[Tensor, ...], indices: object) -> None:
    learner = certify(MODEL, digits[0][:40], digits[2][:40], iterations=10)
    assert learner.delete(indices) == learner.constants.iterations_for(2)
    assert learner.remaining == [i for i in range(40) if i not in (4, 9)]
    learner.delete(np.int64(0))
    learner.delete(torch.tensor(1))
    assert learner.remaining[0] == 2
    assert learner._features.shape == (36, 65), "deleted rows are not kept"


def test_all_that_may_be_deleted_can_be(digits: tuple[Tensor, ...]) -> None:
    learner = certify(MODEL, digits[0][:11], digits[2][:11], iterations=10)
    for i in range(5):
        learner.delete(i)
    with pytest.raises(InputError, match="so 5 can be deleted, and 5 are"):
        learner.delete(5)


# --- What cannot be certified -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Linear(65, 8), nn.ReLU(), nn.Linear(8, 10)), nn.Linear(65, 10), LogisticRegression(), None],
    ids=lambda model: type(model).__name__,
)
def test_other_models_are_refused(digits: tuple[Tensor, ...], model: object) -> None:
    with pytest.raises(InputError, match=rf"a {type(model).__name__} cannot be certified: .* strongly convex"):
        certify(model, digits[0], digits[2])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 64}, "batch_size: minibatches cannot be certified, because"),
        ({"momentum": 0.9}, "momentum cannot be certified: a step that remembers earlier gradients"),
        ({"momentum": math.nan}, "momentum: expected 0, got nan"),
        ({"momentum": "much"}, "momentum: expected 0, got 'much'"),
        ({"mask": object()}, "a mask cannot be certified: weights that may not move keep"),
    ],
)
def test_other_updates_are_refused(digits: tuple[Tensor, ...], arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        certify(MODEL, digits[0], digits[2], **arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, y: (x[:, :64], y), r"features: expected shape \[n, 65\], n from 1, got \[1437, 64\]"),
        (lambda x, y: (x[:0], y[:0]), "features: expected shape"),
        (lambda x, y: (x[:1], y[:1]), "at least 2 samples"),
        (lambda x, y: (x, y[:-1]), "labels: expected one for each of 1437 rows, got 1436"),
        (lambda x, y: (x, y.double()), "labels: expected integers"),
        (lambda x, y: (x, y + 1), r"label 10 is outside the model's 10 classes \(0 to 9\)"),
        (lambda x, y: (x, y - 1), "label -1 is outside"),
        (lambda x, y: (x * 1.001, y), "a row has norm 1.001, above feature_bound=1: scale the rows"),
        (lambda x, y: (x.index_fill(0, torch.tensor([3]), math.nan), y), "features: expected finite numbers"),
    ],
)
def test_data_that_do_not_fit(digits: tuple[Tensor, ...], change: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        certify(MODEL, *change(digits[0], digits[2]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"features": 0}, "features: expected an integer from 1, got 0"),
        ({"classes": 1}, "classes: expected at least 2, got 1"),
        ({"l2": 0.0}, "l2: expected a finite number above 0, got 0.0"),
        ({"feature_bound": math.inf}, "feature_bound"),
    ],
)
def test_models_that_do_not_fit(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SoftmaxRegression(**{"features": 3, "classes": 2, **arguments})


# --- Features -----------------------------------------------------------------------------------------------


def test_unit_rows() -> None:
    values = [[1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [1e200, 0.0, -1e200], [1e-200, 0.0, -1e-200]]
    rows = torch.tensor(values, dtype=torch.float64)
    got = unit_rows(rows, bias=0.5)
    root = math.sqrt(0.5) / math.sqrt(1.25)
    want = [[-root, 0, root], [0, 0, 0], [root, 0, -root], [root, 0, -root]]
    assert torch.allclose(got, torch.tensor([[*row, 0.5 / math.sqrt(1.25)] for row in want]).double(), atol=1e-15)
    assert torch.equal(unit_rows(rows[:1], bias=0.5), got[:1]), "no row depends on another"
    assert float(unit_rows(torch.arange(12).reshape(3, 4)).norm(dim=1).max()) == pytest.approx(1.0, abs=1e-15)
    tenths = unit_rows(torch.full((1, 7), 0.1, dtype=torch.float64))
    assert torch.equal(tenths[0, :7], torch.zeros(7, dtype=torch.float64)), "not the rounding of its mean, at norm 1"
    for bad, message in ((rows[0], "expected a matrix"), (rows / 0, "expected finite numbers")):
        with pytest.raises(InputError, match=message):
            unit_rows(bad)


# --- The word -----------------------------------------------------------------------------------------------


def test_nothing_else_is_called_certified() -> None:
    root = Path(__file__).parents[2]
    for path in [*root.glob("unlearn_ext/**/*.py"), *root.glob("benchmarks/*.py"), *root.glob("csrc/**/*.*")]:
        if "certified" not in str(path.relative_to(root)) and path.is_file():
            assert "certified" not in path.read_text().lower(), path
    for path in [root / "README.md", *root.glob("docs/**/*.md")]:  # pages may link to those that are about it
        if "certified" not in path.name:
            text = re.sub(r"\S*certified\.md\S*|^## Certified deletion$", "", path.read_text(), flags=re.MULTILINE)
            assert "certified" not in text.lower(), path
