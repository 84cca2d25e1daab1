"""What certified deletion publishes: weights with fresh noise, a certificate, and nothing secret."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import pickle
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.certifying import MODEL, unit_digits
from torch import Tensor

from unlearn_ext.certified import DescentToDelete, Publication, certify
from unlearn_ext.certified.noise import system_normals
from unlearn_ext.errors import InputError


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return unit_digits()


@pytest.fixture
def learner(digits: tuple[Tensor, ...]) -> DescentToDelete:
    return certify(MODEL, digits[0], digits[2], iterations=25)


# --- Noise --------------------------------------------------------------------------------------------------


def kolmogorov(values: Tensor) -> float:
    """√n times the largest difference of the empirical and the normal distribution: above 1.95 once in 1,000 times."""
    values, n = values.sort().values, len(values)
    normal = torch.special.ndtr(values)
    ranks = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((ranks[1:] - normal).max(), (normal - ranks[:-1]).max())) * math.sqrt(n)


def test_system_normals() -> None:
    drawn = system_normals((400, 500))
    assert drawn.shape == (400, 500) and drawn.dtype == torch.float64 and bool(torch.isfinite(drawn).all())
    assert kolmogorov(drawn.flatten()) < 2.5  # 1 in 130,000
    assert not torch.equal(system_normals((50,)), system_normals((50,)))


def test_the_ends_of_the_systems_numbers_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    for byte in (b"\x00", b"\xff"):
        monkeypatch.setattr("secrets.token_bytes", lambda count, byte=byte: byte * count)
        assert 8 < float(system_normals((1,)).abs()) < 9


@pytest.mark.parametrize("seeded", [False, True])
def test_published_noise_is_fresh_and_of_size_sigma(learner: DescentToDelete, seeded: bool) -> None:
    generator = torch.Generator().manual_seed(7) if seeded else None
    noise = torch.stack([learner.publish(generator).weights - learner._secret.weights for _ in range(40)])
    noise = noise.flatten(1) / learner.constants.sigma
    assert kolmogorov(noise.flatten()) < 2.5
    # No publication's noise says anything of another's: 780 correlations of 650 numbers, none beyond 5.5 σ.
    correlations = torch.corrcoef(noise) - torch.eye(40, dtype=torch.float64)
    assert float(correlations.abs().max()) < 5.5 / math.sqrt(650)


def test_a_seed_repeats_and_voids_the_guarantee(learner: DescentToDelete) -> None:
    first, second = (learner.publish(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.weights, second.weights)
    for publication in (first, second):
        assert publication.certificate["certified"] is False
        assert publication.certificate["covered"] == []
        assert publication.certificate["statement"].startswith("No guarantee: the noise came from a generator")
    assert learner.publish().certificate["certified"] is True


# --- What is published --------------------------------------------------------------------------------------


def test_certificate(digits: tuple[Tensor, ...], learner: DescentToDelete, tmp_path: Path) -> None:
    x, _, y, _ = digits
    learner.publish()
    learner.delete([0, 7])
    learner.delete(12)
    publication = learner.publish()
    publication.save(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert found == publication.certificate
    c = learner.constants
    assert found["constants"] == {**vars(c)}
    assert {"m", "M", "L", "radius", "gamma", "eta", "sigma", "distance", "training_iterations"} <= found[
        "constants"
    ].keys()
    assert (found["constants"]["epsilon"], found["constants"]["delta"]) == (1.0, 1e-5)
    assert found["deletions"] == {"deleted": 3, "still_possible": len(y) // 2 - 3}
    left = torch.ones(len(y), dtype=torch.bool)
    left[[0, 7, 12]] = False
    digest = hashlib.sha256(x[left].numpy().tobytes() + y[left].numpy().tobytes()).hexdigest()
    assert found["data"]["sha256"] == digest and found["data"]["samples"] == len(y) - 3
    assert found["weights_sha256"] == hashlib.sha256(publication.weights.numpy().tobytes()).hexdigest()
    assert found["publication"]["number"] == 2
    assert 1.4 < found["publication"]["epsilon_of_all"] < 1.5  # √2 and a little
    assert "PMLR v132" in found["source"] and found["formulas"].keys() >= {"m", "M", "L", "radius", "sigma"}
    assert "1434 remaining samples" in found["statement"]
    for phrase in ("made before a sample was deleted", "secret state", "no differential privacy", "chosen by looking"):
        assert any(phrase in line for line in found["not_covered"]), phrase
    loaded = Publication.load(tmp_path / "out")
    assert torch.equal(loaded.weights, publication.weights) and loaded.certificate == found


def test_the_certificates_formulas_give_its_numbers(learner: DescentToDelete) -> None:
    """They are evaluated as they are printed."""
    certificate = learner.publish().certificate
    constants, formulas = certificate["constants"], certificate["formulas"]
    names = {"ln": math.log, "sqrt": math.sqrt, "min": min, "ceil": math.ceil, "floor": math.floor}
    names_of_all = ("X", "m", "M", "radius", "L", "gamma", "eta", "training_iterations", "distance", "sigma")
    for name in (*names_of_all, "max_deletions"):
        text = formulas[name].split(", at least")[0].replace("^", "**")
        for product in ("2 ln", "sqrt(2) (", "sqrt(2) X", "d (1", "l2 radius", "2 radius", "radius m n", "8 L", "2 L"):
            text = text.replace(product, product.replace(" ", " * "))
        text = text.replace("m n", "m * n").replace("n (1 -", "n * (1 -").replace("L gamma", "L * gamma")
        value = eval(text, {"__builtins__": {}}, {**names, **constants, "I": constants["iterations"]})
        assert value == pytest.approx(constants[name], rel=1e-9), name


def test_nothing_secret_is_in_what_is_published(learner: DescentToDelete, tmp_path: Path) -> None:
    learner.delete(range(10))
    publication = learner.publish()
    publication.save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "SHA256SUMS",
        "certificate.json",
        "weights.safetensors",
    ]
    secret = learner._secret.weights
    assert not bool((publication.weights == secret).any())
    text = "".join((repr(learner), repr(learner._secret), repr(publication), json.dumps(publication.certificate)))
    raw = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir()) + text.encode()
    learner.save_secret(tmp_path / "secret.safetensors")
    kept = (tmp_path / "secret.safetensors").read_bytes()
    for value in secret.flatten().tolist():
        packed = np.float64(value).tobytes()
        assert packed not in raw and packed in kept
    for value in [float(secret.norm()), float(secret.sum()), *secret.flatten().tolist()]:
        # The weights of all classes add up to 0, to the last bits of one processor or another.
        assert abs(value) < 1e-9 or repr(abs(value))[:9].encode() not in raw


def test_the_secret_leaves_by_its_own_call_alone(learner: DescentToDelete, tmp_path: Path) -> None:
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy, lambda secret: torch.save(secret, tmp_path / "s.pt")):
        with pytest.raises(InputError, match="not to be pickled or copied: write it with save_secret"):
            attempt(learner._secret)
    with pytest.raises(InputError, match="write it with save_secret"):
        pickle.dumps(learner)
    learner.save_secret(tmp_path / "secret.safetensors")
    assert stat.S_IMODE((tmp_path / "secret.safetensors").stat().st_mode) == 0o600


def test_damaged_publications(learner: DescentToDelete, tmp_path: Path) -> None:
    learner.publish().save(tmp_path / "a")
    learner.publish().save(tmp_path / "b")
    (tmp_path / "b" / "weights.safetensors").replace(tmp_path / "a" / "weights.safetensors")
    with pytest.raises(InputError, match=r"weights\.safetensors is not as it was written"):
        Publication.load(tmp_path / "a")
    for directory in ("b", "none"):
        with pytest.raises(InputError, match="holds no publication"):
            Publication.load(tmp_path / directory)
