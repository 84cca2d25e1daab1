"""The steps of descent to delete's proof, on real digits, against NumPy and Newton's method."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.certifying import MODEL, unit_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from unlearn_ext.certified import Constants, DescentToDelete, SoftmaxRegression, certify


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return unit_digits()


@pytest.fixture
def learner(digits: tuple[Tensor, ...]) -> DescentToDelete:
    return certify(MODEL, digits[0], digits[2], iterations=25)


# --- An independent oracle: NumPy, Newton's method ----------------------------------------------------------


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


# --- The proof's steps --------------------------------------------------------------------------------------


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


@pytest.mark.slow
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
