r"""The constants of the guarantee, and why they hold.

Definition (Neel, Roth and Sharifi-Malvajerdi, "Descent-to-Delete", PMLR v132, 2021; arXiv 2007.02923): learning A and
deletion R are (ε, δ)-unlearning if, for every data set and every sequence of deletions, what is published after each of
them is (ε, δ)-indistinguishable from what A, run on the data that are left, would publish. Both sides here use the same
constants, fixed before the first deletion.

1. **Loss.** :math:`f_i(\theta) = \mathrm{CE}(\theta^\top x_i, y_i) + \frac{l_2}{2}\lVert\theta\rVert^2` with
   :math:`\lVert x_i\rVert \le X`, F their mean. The cross-entropy's Hessian is
   :math:`(\mathrm{diag}\,p - pp^\top) \otimes x x^\top`; by Gershgorin the first factor's eigenvalues are in
   [0, max 2 p_k (1 − p_k)], at most 1/2. So F is m-strongly convex and M-smooth: **m = l2, M = l2 + X²/2**. X is
   :attr:`SoftmaxRegression.row_bound`, a little above ``feature_bound``, up to which rows are let pass.
2. **Ball.** At a minimiser :math:`\frac{l_2}{2}\lVert\theta^*\rVert^2 \le F(\theta^*) \le F(0) = \ln K`, and
   :math:`l_2 \theta^*` is minus a mean of cross-entropy gradients, each of norm at most √2 X. So whatever the data, it
   lies in the ball of radius **R = min(√(2 ln K / l2), √2 X / l2)**: projecting onto it moves no minimiser. In it every
   f_i is L-Lipschitz with **L = √2 X + l2 R**.
3. **Step.** With **η = 2/(M + m)** a gradient step, and then the projection, brings any two points closer by the factor
   **γ = (M − m)/(M + m)**, and leaves the minimiser in place.
4. **Sensitivity.** Deleting k samples, so that :math:`n_i` are left, moves the minimiser by at most
   :math:`k L / (m n_i)`: it is stationary for the sum over the old data, so the gradient of the new mean there is that
   of k samples divided by :math:`n_i`, and strong convexity turns a gradient into a distance.
5. **Stream.** Let q = γ^I and let s bound the sensitivity to one deletion. Training runs T steps,
   **T ≥ I + ln(D m n / 2L) / ln(1/γ)** with D = 2R the ball's diameter, so that it ends within
   :math:`\gamma^T D \le q \cdot 2L/(mn) \le q s` of its minimiser. If before a deletion the secret weights are within
   q s/(1 − q) of theirs, then after it and I steps they are within q (q s/(1 − q) + s) = q s/(1 − q) of the new one:
   the distance does not grow, however long the stream. Retraining ends within q s of the same point, so the two lie
   within 2 q s/(1 − q) of each other.
   Deleting k samples at once takes :math:`I + \ln(1 + (k - 1)(1 - q)) / \ln(1/\gamma)` steps for the same bound, and
   never more than T, which are enough from anywhere in the ball. (That is ours: the paper deletes one by one, which
   would take k I.)
6. **Noise.** The published weights are the secret ones plus N(0, σ²) on each. With :math:`\rho = \Delta^2 / 2\sigma^2`
   two such Gaussians at distance Δ are (ρ + 2√(ρ ln(1/δ)), δ)-indistinguishable (Bun and Steinke, arXiv 1605.02065),
   hence **σ = Δ / (√2 (√(ln(1/δ) + ε) − √(ln(1/δ))))**.

**How many deletions.** The paper's :math:`\sigma = 4\sqrt2 L \gamma^I / (m n (1 - \gamma^I)(\sqrt{\ln(1/\delta) +
\varepsilon} - \sqrt{\ln(1/\delta)}))` is this with **Δ = 8 L q / (m n (1 − q))**, that is s = 4L/(mn), n the size at
the start: a sensitivity of 2L/(m n_i), and at least half of the data left, n_i ≥ n/2. So at most ⌊n/2⌋ samples can be
deleted; after that one trains anew. Steps 4 and 5 need only L/(m n_i), that is 2L/(mn), half of the s used. σ is a
function of constants alone, never of the stream: noise whose size told how much was deleted would tell the two sides
apart.

**Rounding.** The unused half of Δ pays for float64. A step computed in it is off by at most
:attr:`Constants.step_rounding`, all steps together by that over 1 − γ, on either side; an I so large that this exceeds
Δ/2 is refused, because then the proof would be about other numbers than those that are published.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import InputError
from ..utils.arguments import check_count, check_number
from .regression import SoftmaxRegression

__all__ = ["FORMULAS", "Constants", "noise_scale"]

# As the certificate prints them.
FORMULAS = {
    "X": "feature_bound (1 + 1e-12 + (features + 2) / 2^52)",
    "m": "l2",
    "M": "l2 + X^2 / 2",
    "radius": "min(sqrt(2 ln(classes) / l2), sqrt(2) X / l2)",
    "L": "sqrt(2) X + l2 radius",
    "gamma": "(M - m) / (M + m)",
    "eta": "2 / (M + m)",
    "training_iterations": "ceil(I + ln(2 radius m n / (2 L)) / ln(1 / gamma)), at least I = iterations",
    "iterations for k deletions at once": "ceil(I + ln(1 + (k - 1)(1 - gamma^I)) / ln(1 / gamma)), at most "
    "training_iterations",
    "distance": "8 L gamma^I / (m n (1 - gamma^I))",
    "sigma": "distance / (sqrt(2) (sqrt(ln(1 / delta) + epsilon) - sqrt(ln(1 / delta))))",
    "max_deletions": "floor(n / 2)",
}


def noise_scale(distance: float, epsilon: float, delta: float) -> float:
    """σ such that N(a, σ²) and N(b, σ²) are (ε, δ)-indistinguishable for any a and b no further apart than this."""
    a = -math.log(delta)
    return distance * (math.sqrt(a + epsilon) + math.sqrt(a)) / (math.sqrt(2.0) * epsilon)  # 1/(√x − √y) = (√x + √y)/ε


@dataclass(frozen=True)
class Constants:
    """Everything that the guarantee of a stream of deletions rests on; the module says why each holds.

    Attributes:
        n: samples at the start.
        features, classes, l2, feature_bound: of the model.
        iterations: I, steps for each deletion.
        epsilon, delta: the guarantee.
        X: what no row's norm exceeds.
        m, M, L: strong convexity, smoothness, Lipschitz constant.
        radius: of the ball that weights are projected onto.
        gamma, eta: contraction of a step, and its length.
        training_iterations: T.
        max_deletions: how many samples may be deleted before one has to train anew.
        distance: Δ, by which the secret weights and those of retraining can differ at most.
        sigma: of the noise on every published weight.
        step_rounding: by how much float64 can move the weights in one step.
    """

    n: int
    features: int
    classes: int
    l2: float
    feature_bound: float
    iterations: int
    epsilon: float
    delta: float
    X: float
    m: float
    M: float
    radius: float
    L: float
    gamma: float
    eta: float
    training_iterations: int
    max_deletions: int
    distance: float
    sigma: float
    step_rounding: float

    @classmethod
    def of(
        cls, model: SoftmaxRegression, n: int, *, epsilon: float = 1.0, delta: float = 1e-5, iterations: int = 50
    ) -> Constants:
        """For n samples.

        Raises:
            InputError: numbers out of range, fewer than 2 samples, or more iterations than float64 can tell apart.
        """
        check_number("epsilon", epsilon, "a finite number above 0", lambda x: 0.0 < x < math.inf)
        check_number("delta", delta, "a number between 0 and 1", lambda x: 0.0 < x < 1.0)
        check_count("iterations", iterations)
        if n < 2:
            raise InputError(f"features: expected at least 2 samples, of which one can be deleted, got {n}")
        l2, bound = float(model.l2), float(model.feature_bound)
        epsilon, delta, iterations = float(epsilon), float(delta), int(iterations)
        X = float(model.row_bound)
        m, M = l2, l2 + X**2 / 2.0
        radius = min(math.sqrt(2.0 * math.log(model.classes) / l2), math.sqrt(2.0) * X / l2)
        L = math.sqrt(2.0) * X + l2 * radius
        gamma, eta = (M - m) / (M + m), 2.0 / (M + m)
        if not 0.0 < gamma < 1.0:
            raise InputError(
                f"l2: {l2:g} with feature_bound={bound:g} leaves float64 no contraction to compute with: choose another"
            )
        q = gamma**iterations
        extra = math.log(max(1.0, 2.0 * radius * m * n / (2.0 * L))) / -math.log(gamma)
        distance = 8.0 * L * q / (m * n * (1.0 - q))
        constants = cls(
            n=n,
            features=model.features,
            classes=model.classes,
            l2=l2,
            feature_bound=bound,
            iterations=iterations,
            epsilon=epsilon,
            delta=delta,
            X=X,
            m=m,
            M=M,
            radius=radius,
            L=L,
            gamma=gamma,
            eta=eta,
            training_iterations=math.ceil(iterations + extra),
            max_deletions=n // 2,
            distance=distance,
            sigma=noise_scale(distance, epsilon, delta),
            step_rounding=_step_rounding(model, n, radius, L, eta),
        )
        if 2.0 * constants.step_rounding / (1.0 - gamma) > distance / 2.0:
            raise InputError(
                f"iterations: {iterations} bring the weights closer to retraining ({distance:.1e}) than float64 "
                "resolves, and a smaller noise would not be covered by the proof: use fewer"
            )
        return constants

    def iterations_for(self, deletions: int) -> int:
        """Steps after deleting so many samples at once."""
        if deletions == 1:
            return self.iterations
        q = self.gamma**self.iterations
        more = math.log1p((deletions - 1) * (1.0 - q)) / -math.log(self.gamma)
        return min(math.ceil(self.iterations + more), self.training_iterations)

    def epsilon_of(self, publications: int) -> float:
        """ε at the same δ of so many publications seen together: their ρ add up."""
        a, rho = -math.log(self.delta), publications * (self.distance / self.sigma) ** 2 / 2.0
        return rho + 2.0 * math.sqrt(rho * a)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _step_rounding(model: SoftmaxRegression, n: int, radius: float, L: float, eta: float) -> float:
    """Standard bounds of float64 sums, doubled: logits of ``features`` terms of norms X and R, probabilities of K
    logits, a mean of n terms of norm √2 X; then the step and the projection, whose norm is a root of ``features`` · K
    squares."""
    X, K = model.row_bound, model.classes
    probabilities = math.sqrt(K) * (2.0 * model.features * X * radius + K + 10.0)
    gradient = n * math.sqrt(2.0) * X + X * probabilities + 4.0 * L
    return 2.0 * 2.0**-53 * (eta * gradient + (8.0 + model.features * K / 2.0) * radius)
