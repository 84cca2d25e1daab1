"""Descent to delete: the constants by hand, noise of the right size, and settings that have none."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.certifying import MODEL
from hypothesis import given
from hypothesis import strategies as st

from unlearn_ext.certified import Constants, SoftmaxRegression, certify
from unlearn_ext.certified.constants import noise_scale
from unlearn_ext.errors import InputError


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
