"""Damage of what certified deletion keeps and publishes: any changed bit is noticed."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from unlearn_ext.certified import DescentToDelete, Publication, SoftmaxRegression, certify
from unlearn_ext.errors import InputError


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.nn.functional.normalize(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    return rows, torch.arange(40) % 2


@pytest.fixture(scope="module")
def learner(data) -> DescentToDelete:
    return certify(SoftmaxRegression(3, 2), *data, iterations=25)


def flips(path: Path, count: int, seed: int):
    """The file with one bit changed after the other; whole again at the end."""
    content, draw = path.read_bytes(), random.Random(seed)
    for bit in [0, 8 * len(content) - 1, *(draw.randrange(8 * len(content)) for _ in range(count))]:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        yield
    path.write_bytes(content)


def test_any_flipped_bit_of_the_secret_is_noticed(data, learner, tmp_path: Path) -> None:
    path = tmp_path / "secret.safetensors"
    learner.save_secret(path)
    for _ in flips(path, 400, seed=3):
        with pytest.raises(InputError, match=r"is damaged|is not a secret state"):
            DescentToDelete.load_secret(path, *data)
    assert torch.equal(DescentToDelete.load_secret(path, *data)._secret.weights, learner._secret.weights)


@pytest.mark.parametrize("name", ["weights.safetensors", "certificate.json", "SHA256SUMS"])
def test_somebody_elses_file_is_not_overwritten(name: str, learner, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"of a dataset")
    with pytest.raises(InputError, match=f"its {name} is of no publication and would be overwritten: choose another"):
        learner.publish().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == b"of a dataset"


def test_hashes_of_other_files_are_kept_beside_any_weights(learner, tmp_path: Path) -> None:
    learner.publish().save(tmp_path)
    (tmp_path / "SHA256SUMS").write_text("# unlearn_ext checkpoint, 0 files\n")
    with pytest.raises(InputError, match="its SHA256SUMS is of no publication"):
        learner.publish().save(tmp_path)


@pytest.mark.parametrize("name", ["weights.safetensors", "certificate.json", "SHA256SUMS"])
def test_any_flipped_bit_of_a_publication_is_noticed(name: str, learner, tmp_path: Path) -> None:
    publication = learner.publish()
    publication.save(tmp_path)
    for _ in flips(tmp_path / name, 200, seed=5):
        with pytest.raises(InputError, match=r"holds no publication that can be read: its .*; take another copy"):
            Publication.load(tmp_path)
    assert torch.equal(Publication.load(tmp_path).weights, publication.weights)
    assert subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=tmp_path, check=False).returncode == 0


def test_a_publication_whose_hashes_were_taken_away(learner, tmp_path: Path) -> None:
    learner.publish().save(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(InputError, match="its SHA256SUMS is missing"):
        Publication.load(tmp_path)
    certificate = tmp_path / "certificate.json"  # as versions before wrote it
    certificate.write_text(certificate.read_text().replace("certificate.2", "certificate.1"))
    Publication.load(tmp_path)


def test_a_secret_of_an_earlier_version_is_read(data, learner, tmp_path: Path) -> None:
    learner.save_secret(tmp_path / "new")
    with safe_open(tmp_path / "new", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("weights", "remaining")}
        metadata = {"format": "unlearn_ext.secret_state.1", "header": file.metadata()["header"]}
    save_file(tensors, tmp_path / "old", metadata=metadata)
    again = DescentToDelete.load_secret(tmp_path / "old", *data)
    assert torch.equal(again._secret.weights, learner._secret.weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, header: header.update(publications=float("inf")), "publications: expected a whole number"),
        (lambda tensors, header: header.update(publications=-1), "publications: expected a whole number"),
        (lambda tensors, header: header["settings"].update(epsilon=10**400), r"is damaged"),
        (lambda tensors, header: tensors["weights"][0].fill_(math.nan), "its weights are not finite"),
        (lambda tensors, header: tensors["remaining"][3:5].fill_(3), "its sample numbers do not ascend"),
        (lambda tensors, header: tensors["remaining"].sub_(1), "its sample numbers do not ascend"),
    ],
)
def test_a_secret_that_nobody_wrote(data, learner, change, message, tmp_path: Path) -> None:
    """The earlier format has no hash."""
    path = tmp_path / "secret"
    learner.save_secret(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("weights", "remaining")}
        header = json.loads(file.metadata()["header"])
    change(tensors, header)
    save_file(tensors, path, metadata={"format": "unlearn_ext.secret_state.1", "header": json.dumps(header)})
    with pytest.raises(InputError, match=message):
        DescentToDelete.load_secret(path, *data)


def test_the_home_folder(data, learner, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    learner.save_secret("~/keep/secret")
    learner.publish().save("~/out")
    DescentToDelete.load_secret("~/keep/secret", *data)
    Publication.load("~/out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keep", "out"]
    shutil.rmtree(tmp_path / "out")
