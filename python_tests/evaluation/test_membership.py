"""The entropy attack, against the exact optimum in 60 decimal digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from unlearn_ext.evaluation import entropy_mia
from unlearn_ext.evaluation.logistic import fit_cut


def optimum(members: list[float], others: list[float]) -> tuple[Decimal, Decimal]:
    """Slope and intercept where scikit-learn's objective is smallest.

    Newton's method in slope and intercept, halved until the objective falls, in decimal numbers of as many digits as
    the features' size takes, until 30 digits of both stand.
    """
    with localcontext() as context:
        largest = max(map(abs, members + others))
        context.prec = 60 + 3 * max(0, -math.floor(math.log10(largest)))
        x = [Decimal(v) for v in members + others]
        y = [1] * len(members) + [-1] * len(others)
        s = [Decimal(len(x)) / (2 * y.count(label)) for label in y]

        def objective(a: Decimal, b: Decimal) -> Decimal:
            margins = [1 + (-label * (a * v + b)).exp() for v, label in zip(x, y, strict=True)]
            return a * a / 2 + sum(w * m.ln() for w, m in zip(s, margins, strict=True))

        a = b = Decimal(0)
        for _ in range(100):
            p = [1 / (1 + (-(a * v + b)).exp()) for v in x]
            off = [w * (q - (label + 1) // 2) for w, q, label in zip(s, p, y, strict=True)]
            h = [w * q * (1 - q) for w, q in zip(s, p, strict=True)]
            of_a, of_b = a + sum(map(Decimal.__mul__, off, x)), sum(off)
            aa, ab, bb = 1 + sum(k * v * v for k, v in zip(h, x, strict=True)), sum(map(Decimal.__mul__, h, x)), sum(h)
            determinant = aa * bb - ab * ab
            by_a, by_b = (bb * of_a - ab * of_b) / determinant, (aa * of_b - ab * of_a) / determinant
            if abs(by_a) <= abs(a) * Decimal("1e-30") and abs(by_b) <= abs(b) * Decimal("1e-30"):
                return a, b
            size = Decimal(1)
            if max(abs(by_a), abs(by_b)) > 1:  # where a whole step may be too long
                now = objective(a, b)
                while objective(a - size * by_a, b - size * by_b) > now:
                    size /= 2
            a, b = a - size * by_a, b - size * by_b
    raise AssertionError("no optimum")


def check(members: Tensor, others: Tensor, asked: Tensor) -> None:
    """The cut to 12 digits of the features' spread, and what is taken for a member."""
    a, b = optimum(members.tolist(), others.tolist())
    cut = fit_cut(members, others)
    with localcontext() as context:
        context.prec = 1000
        expected = sum(a * Decimal(v) + b > 0 for v in asked.tolist()) / len(asked)
        at = Decimal(cut.origin) + cut.sign * Decimal(cut.at) * Decimal(cut.scale)
        assert abs(at + b / a) <= Decimal("1e-12") * Decimal(cut.scale)
    assert 0.0 < expected < 1.0
    assert attack(members, others, asked) == pytest.approx(expected, abs=1e-12)


def drawn(count: int, seed: int, power: float = 2.0) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** power


def attack(members: Tensor, others: Tensor, asked: Tensor) -> float:
    return float(fit_cut(members, others).members(asked).double().mean())


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "confident": lambda x: 1e-7 * x,
    "very confident": lambda x: 1e-30 * x,
    "squares underflow": lambda x: 1e-200 * x,
    "small": lambda x: 0.1 * x,
    "unsure": lambda x: x,
    "spread": lambda x: 5 * x,
    "wrecked": lambda x: math.log(10) - 1e-7 * x,
    "nearly uniform": lambda x: math.log(10) - 1e-11 * x,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_attack_is_that_of_the_exact_optimum_at_every_scale(shape: str, seed: int) -> None:
    members, others, asked = drawn(20, 10 * seed, 3.0), drawn(8, 10 * seed + 1, 1.5), drawn(101, 10 * seed + 2, 1.5)
    members, others, asked = (SHAPES[shape](x) for x in (members, others, asked))
    check(members, others, asked)


def test_members_may_be_the_less_certain_ones() -> None:
    members, others, asked = drawn(20, 0, 0.5), drawn(40, 1, 3.0), drawn(50, 2)
    check(members, others, asked)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 3.0])
def test_separable_entropies_have_a_cut_too(scale: float) -> None:
    members, others = scale * drawn(12, 0) * 0.4, scale * (0.6 + 0.4 * drawn(5, 1))
    asked = scale * torch.linspace(0, 1, 401, dtype=torch.float64)
    check(members, others, asked)


def test_what_scikit_learn_finds_where_it_converges() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    members, others, asked = 2 * drawn(400, 0, 4.0), 2 * drawn(90, 1), 2 * drawn(5000, 2)
    fitted = linear_model.LogisticRegression(class_weight="balanced", tol=1e-12, max_iter=10_000)
    fitted.fit(torch.cat([members, others])[:, None].numpy(), [1] * 400 + [0] * 90)
    assert attack(members, others, asked) == pytest.approx(fitted.predict(asked[:, None].numpy()).mean(), abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 5e-324, 1e-310, 1e-7, 2.302585092994046])
def test_equal_entropies_tell_nobody(value: float) -> None:
    same = torch.full((7,), value, dtype=torch.float64)
    assert attack(same, same[:3], same) == 0.0
    off = same * (1 + torch.tensor([0.0, 2.0, -2.0, 0.0, 2.0, 1.0, 0.0], dtype=torch.float64) * 2**-52)  # rounding
    assert attack(off, same[:3], same) == 0.0
    mixed = torch.cat([drawn(9, 0), same])
    assert attack(mixed, mixed.flip(0), mixed) == 0.0  # the same samples on both sides


def test_denormal_entropies_are_cut_at_the_balanced_mean() -> None:
    """The slope vanishes with their squares, and the cut's limit is the mean of the two means."""
    members = torch.tensor([0, 2, 4, 6], dtype=torch.int64).view(torch.float64)
    others = torch.tensor([20, 40], dtype=torch.int64).view(torch.float64)
    asked = torch.tensor([0, 16, 17, 40], dtype=torch.int64).view(torch.float64)  # (3 + 30) / 2 is 16.5
    assert attack(members, others, asked) == 0.5
    far = torch.tensor([1e-300, 2.0, 0.0], dtype=torch.float64)  # beyond what a quotient by such a scale holds
    assert attack(members, others, far) == pytest.approx(1 / 3)


# --- From logits --------------------------------------------------------------------------------------------------


def exact_entropy(row: list[float], less: int = 1) -> float:
    """Less the logarithm of ``less``."""
    with localcontext() as context:
        context.prec = 60 + round(max(row) - min(row))
        z = [Decimal(v) for v in row]
        chances = [(v - max(z)).exp() for v in z]
        total = sum(chances)
        return float(-sum(c / total * (c / total).ln() for c in chances) - Decimal(less).ln())


def expected_of(retain: Tensor, test: Tensor, forget: Tensor, less: int = 1) -> float:
    entropies = [[exact_entropy(row, less) for row in part.double().tolist()] for part in (retain, test, forget)]
    a, b = optimum(*entropies[:2])
    with localcontext() as context:
        context.prec = 1000
        return sum(a * Decimal(v) + b > 0 for v in entropies[2]) / len(forget)


def margins(count: int, seed: int, low: float, high: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits of three classes, the first ahead by ``low`` to ``high``."""
    generator = torch.Generator().manual_seed(seed)
    rest = torch.rand(count, 3, generator=generator, dtype=torch.float64) * 0.1
    rest[:, 0] += low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
    return rest.to(dtype)


@pytest.mark.parametrize("ahead", [0.0, 16.0, 60.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_every_confidence(ahead: float, dtype: torch.dtype) -> None:
    retain, test = margins(25, 0, ahead + 2, ahead + 3, dtype), margins(9, 1, ahead, ahead + 3, dtype)
    forget = margins(60, 2, ahead, ahead + 3, dtype)
    expected = expected_of(retain, test, forget)
    assert entropy_mia(retain, test, forget) == pytest.approx(expected, abs=1e-12) and 0.0 < expected < 1.0


@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-8, 1e-11])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_logits_of_a_network_that_says_nothing(size: float, offset: float) -> None:
    """All entropies are ln K up to the square of the logits' size."""
    retain, test, forget = (
        (offset + size * factor * margins(count, seed, 0.0, 1.0).float()).float()
        for seed, count, factor in ((0, 25, 1.5), (1, 9, 1.0), (2, 60, 1.2))
    )
    if offset and size < 1e-7:  # which float32 has lost
        assert entropy_mia(retain, test, forget) == 0.0
    else:
        expected = expected_of(retain, test, forget, less=3)
        assert entropy_mia(retain, test, forget) == pytest.approx(expected, abs=1e-12) and 0.0 < expected < 1.0
    rolled = retain.roll(1, dims=1)  # the same entropies
    assert entropy_mia(retain, rolled, forget) == 0.0


def test_logits_as_large_as_they_get() -> None:
    largest = torch.tensor([[1.7e308, -1.7e308], [0.0, 0.0]], dtype=torch.float64)
    assert entropy_mia(largest[:1], largest[1:], largest) == 0.5
    assert entropy_mia(largest[:1], largest[:1], largest[:1]) == 0.0
    assert entropy_mia(-largest[1:], largest[1:], largest) == 0.0
