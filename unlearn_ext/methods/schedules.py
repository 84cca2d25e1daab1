"""How a strength changes over a run: a factor of its start value at iteration t of T."""

from __future__ import annotations

import math

__all__ = ["SCHEDULES", "factor"]

SCHEDULES = {
    "constant": lambda x: 1.0,
    "cosine": lambda x: (1.0 + math.cos(math.pi * x)) / 2.0,
    "linear": lambda x: 1.0 - x,
    "quadratic": lambda x: (1.0 - x) ** 2,
}


def factor(schedule: str, iteration: int, iterations: int) -> float:
    """constant: 1; cosine: (1 + cos(πt/T))/2; linear: 1 − t/T; quadratic: (1 − t/T)². t counts from 0."""
    return SCHEDULES[schedule](iteration / iterations)
