"""Descent to delete: the constants by hand, the proof's steps on real digits, a stream of deletions, what leaks."""

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
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from unlearn_ext.certified import Constants, DescentToDelete, Publication, SoftmaxRegression, certify, unit_rows
from unlearn_ext.certified.constants import noise_scale
from unlearn_ext.certified.noise import system_normals
from unlearn_ext.errors import InputError

MODEL = SoftmaxRegression(features=65, classes=10, l2=0.05)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and held-out features, then their labels: scikit-learn's 1,797 digits of 8 × 8 pixels."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=360, stratify=labels, random_state=0)
    train, test, train_labels, test_labels = map(torch.from_numpy, parts)
    return unit_rows(train), unit_rows(test), train_labels, test_labels


@pytest.fixture
def learner(digits: tuple[Tensor, ...]) -> DescentToDelete:
    return certify(MODEL, digits[0], digits[2], iterations=25)


# --- An independent oracle: NumPy, Newton's method ------------------------------------------------------------


def probabilities(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    z = x @ weights
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def objective(weights: np.ndarray, x: np.ndarray, y: np.ndarray, l2: float) -> float:
    return -np.log(probabilities(weights, x)[np.arange(len(y)), y]).mean() + l2 / 2 * (weights**2).sum()


def gradient(weights: np.ndarray, x: np.ndarray, y: np.ndarray, l2: float) -> np.ndarray:
    p = probabilities(weights, x)
    p[np.arange(len(y)), y] -= 1
    return x.T @ p / len(y) + l2 * weights


def hessian(weights: np.ndarray, x: np.ndarray, l2: float) -> np.ndarray:
    (d, k), p = weights.shape, probabilities(weights, x)
    h = np.empty((d, k, d, k))
    for a in range(k):
        for b in range(k):
            h[:, a, :, b] = (x * (p[:, a] * ((a == b) - p[:, b]))[:, None]).T @ x / len(x)
    return h.reshape(d * k, d * k) + l2 * np.eye(d * k)


def minimiser(
    features: Tensor, labels: Tensor, model: SoftmaxRegression = MODEL, start: Tensor | None = None
) -> Tensor:
    x, y = features.numpy(), labels.numpy()
    weights = np.zeros((model.features, model.classes)) if start is None else start.numpy().copy()
    for _ in range(50):
        g = gradient(weights, x, y, model.l2)
        if np.linalg.norm(g) < 1e-14:
            break
        step, length = np.linalg.solve(hessian(weights, x, model.l2), g.ravel()).reshape(weights.shape), 1.0
        before = objective(weights, x, y, model.l2)
        while objective(weights - length * step, x, y, model.l2) > before + 1e-15:
            length /= 2
        weights = weights - length * step
    assert np.linalg.norm(g) < 1e-13
    return torch.from_numpy(weights)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm())


# --- Constants ----------------------------------------------------------------------------------------------


def test_constants_by_hand() -> None:
    """l2 1/2, norm 1, two classes, 100 samples: every number written out."""
    c = Constants.of(SoftmaxRegression(3, 2, l2=0.5), 100, epsilon=2.0, delta=0.01, iterations=3)
    radius = math.sqrt(4 * math.log(2))  # 1.665, where √2/l2 would be 2.828
    lipschitz = math.sqrt(2) + 0.5 * radius
    assert (c.m, c.M, c.radius, c.L) == (0.5, pytest.approx(1.0), pytest.approx(radius), pytest.approx(lipschitz))
    assert (c.gamma, c.eta) == (pytest.approx(1 / 3), pytest.approx(4 / 3))
    # D m n / 2L = 3.330 · 0.5 · 100 / 4.493 = 37.06, and ln 37.06 / ln 3 = 3.288
    assert c.training_iterations == math.ceil(3 + 3.288) == 7
    assert c.max_deletions == 50
    # 8 · 2.2465 / 27 / (0.5 · 100 · 26/27) = 17.972 / 1300
    assert c.distance == pytest.approx(0.0138252, rel=1e-4)
    # √(4.60517 + 2) − √4.60517 = 2.570053 − 2.145966 = 0.424087; times √2: 0.599750
    assert c.sigma == pytest.approx(0.0138252 / 0.599750, rel=1e-4)


@given(
    n=st.integers(10, 10**6),
    l2=st.sampled_from((0.3, 0.05, 0.01)),
    iterations=st.integers(1, 60),
    epsilon=st.sampled_from((0.01, 0.5, 1.0, 8.0)),
    delta=st.sampled_from((1e-3, 1e-5, 1e-9)),
)
def test_sigma_is_the_papers(n: int, l2: float, iterations: int, epsilon: float, delta: float) -> None:
    model = SoftmaxRegression(20, 5, l2=l2)
    try:
        c = Constants.of(model, n, epsilon=epsilon, delta=delta, iterations=iterations)
    except InputError as error:
        assert "float64" in str(error)
        return
    q = ((c.M - c.m) / (c.M + c.m)) ** iterations
    root = math.sqrt(math.log(1 / delta) + epsilon) - math.sqrt(math.log(1 / delta))
    assert c.sigma == pytest.approx(4 * math.sqrt(2) * c.L * q / (c.m * n * (1 - q) * root), rel=1e-9)
    least = iterations + math.log(max(1.0, 2 * c.radius * c.m * n / (2 * c.L))) / math.log(1 / c.gamma)
    assert least <= c.training_iterations < least + 1 + 1e-9
    # What one publication spends is what was asked for; more of them spend more.
    assert c.epsilon_of(1) == pytest.approx(epsilon, rel=1e-9)
    assert c.epsilon_of(4) > 1.9 * epsilon


@pytest.mark.parametrize("epsilon, delta", [(0.1, 1e-5), (1.0, 1e-5), (3.0, 1e-2)])
def test_noise_makes_gaussians_indistinguishable(epsilon: float, delta: float) -> None:
    """The exact δ of two Gaussians at this distance (Balle and Wang, 2018) is below the one that was asked for."""
    sigma = noise_scale(0.7, epsilon, delta)

    def normal_cdf(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    a, b = 0.7 / (2 * sigma), epsilon * sigma / 0.7
    exact = normal_cdf(a - b) - math.exp(epsilon) * normal_cdf(-a - b)
    assert 0 < exact <= delta


def test_batches_of_deletions_need_no_more_than_one_by_one() -> None:
    c = Constants.of(MODEL, 1000, iterations=25)
    q, s = c.gamma**25, 4 * c.L / (c.m * c.n)
    assert c.iterations_for(1) == 25
    assert c.iterations_for(500) == c.training_iterations, "from anywhere in the ball those are enough"
    assert c.gamma**c.training_iterations * 2 * c.radius <= q * s
    for k in (2, 3, 10, 100):
        steps = c.iterations_for(k)
        assert 25 <= steps <= 25 * k
        # The distance after it is again that of the induction, and with two steps fewer it would not be.
        assert c.gamma**steps * (q * s / (1 - q) + k * s) <= q * s / (1 - q) * (1 + 1e-12)
        assert c.gamma ** (steps - 2) * (q * s / (1 - q) + k * s) > q * s / (1 - q)


def test_more_iterations_than_float64_resolves_are_refused() -> None:
    with pytest.raises(InputError, match=r"iterations: 500 bring .* closer .* than float64 resolves"):
        Constants.of(MODEL, 1000, iterations=500)
    smallest = Constants.of(MODEL, 1000, iterations=100)
    assert 2 * smallest.step_rounding / (1 - smallest.gamma) < smallest.distance / 2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"epsilon": 0.0}, "epsilon: expected a finite number above 0, got 0.0"),
        ({"epsilon": math.inf}, "epsilon"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"delta": 0.0}, "delta: expected a number between 0 and 1, got 0.0"),
        ({"delta": 1.0}, "delta"),
        ({"iterations": 0}, "iterations: expected an integer from 1, got 0"),
        ({"iterations": 2.5}, "iterations"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Constants.of(MODEL, 100, **settings)


def test_the_longest_row_that_is_let_pass_is_in_the_constants() -> None:
    model = SoftmaxRegression(3, 2, l2=0.5, feature_bound=2.0)
    x = torch.tensor([[0.0, 2.0 * (1.0 + 9.9e-13), 0.0]] * 2, dtype=torch.float64)
    learner = certify(model, x, torch.tensor([0, 1]), iterations=2)
    c, longest = learner.constants, float(x.norm(dim=1).max())
    assert 2.0 < longest <= c.X < 2.0 * (1 + 2e-12)
    assert c.M - c.l2 >= longest**2 / 2, "which two classes at even odds attain"
    assert math.sqrt(2) * longest + c.l2 * c.radius <= c.L
    with pytest.raises(InputError, match="a row has norm"):
        certify(model, x * (1 + 2e-12), torch.tensor([0, 1]), iterations=2)


def test_the_rounding_of_the_projections_norm_counts() -> None:
    """By the standard bound of a sum of squares, halved by the root: large l2 and small n leave little else."""
    model = SoftmaxRegression(1000, 400, l2=1e4)
    c = Constants.of(model, 2, iterations=1)
    assert c.step_rounding >= 1000 * 400 / 2 * 2.0**-53 * c.radius


@pytest.mark.parametrize("l2", [1e17, 1e-18])
def test_a_penalty_beyond_float64(l2: float) -> None:
    with pytest.raises(InputError, match="leaves float64 no contraction"):
        Constants.of(SoftmaxRegression(3, 2, l2=l2), 100)


# --- The proof's steps, on real digits ------------------------------------------------------------------------


def test_curvature_lies_between_m_and_M(digits: tuple[Tensor, ...]) -> None:
    x, c = digits[0].numpy(), Constants.of(MODEL, len(digits[0]))
    rng = np.random.default_rng(0)
    for scale in (0.0, 1.0, 5.0):
        values = np.linalg.eigvalsh(hessian(scale * rng.standard_normal((65, 10)), x, MODEL.l2))
        assert c.m - 1e-12 <= values[0] and values[-1] <= c.M + 1e-12
    # Both are attained: M by two classes at even odds, m along what all classes share.
    one = hessian(np.zeros((1, 2)), np.ones((5, 1)), MODEL.l2)
    assert np.linalg.eigvalsh(one) == pytest.approx([c.m, c.M])


def test_gradients_in_the_ball_are_bounded_by_L(digits: tuple[Tensor, ...]) -> None:
    x, y, c = digits[0].numpy(), digits[2].numpy(), Constants.of(MODEL, len(digits[0]))
    rng, largest = np.random.default_rng(1), 0.0
    for i in range(200):
        weights = rng.standard_normal((65, 10))
        weights[:, y[i]] -= 3 * x[i] * np.sqrt(650) * (i % 2)  # half of them are surely wrong about the sample
        weights *= c.radius / np.linalg.norm(weights)
        largest = max(largest, float(np.linalg.norm(gradient(weights, x[i : i + 1], y[i : i + 1], MODEL.l2))))
    assert 0.6 * c.L < largest <= c.L


def test_the_minimiser_is_in_the_ball(digits: tuple[Tensor, ...]) -> None:
    x, _, y, _ = digits
    for l2 in (0.05, 3.0):  # the radius is the first of its two bounds, then the second
        model = SoftmaxRegression(65, 10, l2=l2)
        radius = Constants.of(model, 100, iterations=2).radius
        assert radius == pytest.approx(min(math.sqrt(2 * math.log(10) / l2), math.sqrt(2) / l2))
        for chosen in (slice(None), y == 3, slice(0, 1)):
            assert float(minimiser(x[chosen], y[chosen], model).norm()) < radius


def test_each_step_contracts_by_gamma(digits: tuple[Tensor, ...]) -> None:
    x, _, y, _ = digits
    c = Constants.of(MODEL, len(y))
    best = minimiser(x, y)
    sklearn = LogisticRegression(C=1 / (len(y) * MODEL.l2), fit_intercept=False, tol=1e-10, max_iter=2000)
    assert distance(best, torch.from_numpy(sklearn.fit(x.numpy(), y.numpy()).coef_.T)) < 1e-4
    rng = torch.Generator().manual_seed(0)
    for outside in (False, True):
        at = torch.randn(65, 10, generator=rng, dtype=torch.float64)
        at *= (3.0 if outside else 1.0) * c.radius / at.norm()
        before, ratios = distance(at, best), []
        for _ in range(60):
            at = MODEL.descend(at, x, y, steps=1, eta=c.eta, radius=c.radius)
            assert float(at.norm()) <= c.radius * (1 + 1e-15)
            now = distance(at, best)
            ratios.append(now / before)
            before = now
        assert max(ratios) <= c.gamma + 1e-9
        # What all classes share has the least curvature, m: the rate is not only a bound.
        assert ratios[-1] > c.gamma - 0.02


def test_a_step_follows_the_formula(digits: tuple[Tensor, ...]) -> None:
    x, _, y, _ = digits
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((65, 10))
    want = weights - 0.3 * gradient(weights, x.numpy(), y.numpy(), MODEL.l2)
    start = torch.from_numpy(weights)
    got = MODEL.descend(start, x, y, steps=1, eta=0.3, radius=1e9)
    assert distance(got, torch.from_numpy(want)) < 1e-13
    assert torch.equal(start, torch.from_numpy(weights))
    got = MODEL.descend(start, x, y, steps=1, eta=0.3, radius=2.0)
    assert distance(got, torch.from_numpy(want * 2.0 / np.linalg.norm(want))) < 1e-13


@pytest.mark.parametrize("l2, iterations", [(0.05, 5), (0.05, 25), (0.01, 40)])
def test_a_stream_stays_as_close_to_retraining_as_sigma_says(
    digits: tuple[Tensor, ...], l2: float, iterations: int
) -> None:
    x, _, y, _ = digits
    model = SoftmaxRegression(65, 10, l2=l2)
    learner = certify(model, x, y, iterations=iterations)
    c, left = learner.constants, torch.ones(len(y), dtype=torch.bool)
    secret = learner._secret.weights
    best = minimiser(x, y, model)
    assert distance(secret, best) <= c.gamma**iterations * 2 * c.L / (c.m * c.n)
    # The samples that the model finds hardest, whose deletion moves it most: one by one, then many at once.
    residuals = torch.from_numpy(probabilities(best.numpy(), x.numpy()))
    hardest = residuals[torch.arange(len(y)), y].argsort().tolist()
    undone = 0.0
    for batch in [[i] for i in hardest[:5]] + [hardest[5:105], hardest[105:106], hardest[106:400]]:
        steps = learner.delete(batch)
        assert steps == c.iterations_for(len(batch))
        left[batch] = False
        undone = max(undone, distance(secret, best := minimiser(x[left], y[left], model, start=best)))
        secret = learner._secret.weights
        retrained = certify(model, x[left], y[left], iterations=iterations)
        fresh = model.descend(
            torch.zeros_like(secret), x[left], y[left], steps=c.training_iterations, eta=c.eta, radius=c.radius
        )
        assert distance(secret, best) <= c.distance / 2
        assert distance(secret, fresh) <= c.distance
        assert distance(secret, retrained._secret.weights) <= c.distance
    assert undone > c.distance / 2 or iterations == 5, (
        "doing nothing would have been close enough: the test shows nothing"
    )
    assert (learner.samples, learner.deleted) == (int(left.sum()), 400)
    assert learner.remaining == left.nonzero().flatten().tolist()


def test_held_out_digits(digits: tuple[Tensor, ...], learner: DescentToDelete) -> None:
    _, test, _, labels = digits
    learner.delete(range(0, 300, 3))
    plain = float(((test @ learner._secret.weights).argmax(1) == labels).double().mean())
    published = [float((learner.publish().logits(test).argmax(1) == labels).double().mean()) for _ in range(20)]
    print(f"held-out accuracy: {100 * plain:.1f} % before noise, {100 * np.mean(published):.1f} % published")
    assert plain > 0.86
    assert np.mean(published) > plain - 0.03


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
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["certificate.json", "weights.safetensors"]
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
        assert repr(abs(value))[:9].encode() not in raw


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
    with pytest.raises(InputError, match="the certificate is that of other weights"):
        Publication.load(tmp_path / "a")
    for directory in ("b", "none"):
        with pytest.raises(InputError, match="holds no publication"):
            Publication.load(tmp_path / directory)


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
        ({"momentum": math.nan}, "momentum cannot be certified"),
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
    root = Path(__file__).parents[1]
    for path in [*root.glob("unlearn_ext/**/*.py"), *root.glob("benchmarks/*.py"), *root.glob("csrc/**/*.*")]:
        if "certified" not in str(path.relative_to(root)) and path.is_file():
            assert "certified" not in path.read_text().lower(), path
    readme = (root / "README.md").read_text()
    section = "\n## Certified deletion\n"
    before, _, rest = readme.partition(section)
    assert "certified" not in (before + rest[rest.find("\n## ") :] if rest else before).lower()
