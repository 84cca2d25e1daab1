"""What every method of a comparison has in common."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..data.digits import CLASSES
from ..errors import InputError
from ..utils.arguments import check_count

__all__ = ["DIGITS", "Protocol"]

DIGITS = 5000  # that there are


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Sizes, what is forgotten, and how the compared models are trained.

    Args:
        scenario: ``random``: a random part of the training set is forgotten; ``class``: all of one digit.
        forget_class: the digit (scenario ``class``).
        forget_fraction: of the training set (scenario ``random``).
        train_size: training digits.
        held_out_size: digits that nobody trains on, for methods that ask what unseen data look like.
        test_size: digits that only the evaluation sees.
        epochs: of training; None: 24,000 / train_size, at least 6 and at most 24.
        batch_size: of training, forgetting and retaining.
        device: where to compute.

    Raises:
        InputError: what does not fit, by the name of the command line's option.
    """

    scenario: str = "random"
    forget_class: int = 3
    forget_fraction: float = 0.2
    train_size: int = 1000
    held_out_size: int = 2000
    test_size: int = 2000
    epochs: int | None = None
    batch_size: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.scenario not in ("random", "class"):
            raise InputError(f"--scenario: expected random or class, got {self.scenario!r}")
        if not 0 <= self.forget_class < CLASSES:
            raise InputError(f"--forget-class: expected a digit from 0 to 9, got {self.forget_class}")
        if not 0.0 < self.forget_fraction < 1.0:
            raise InputError(
                f"--forget-fraction: expected a fraction between 0 and 1, got {self.forget_fraction}: something must "
                "be forgotten and something kept"
            )
        for option, size in (("--train-size", self.train_size), ("--test-size", self.test_size)):
            if size < CLASSES:
                raise InputError(f"{option}: expected at least {CLASSES}, one digit of each class, got {size}")
        if self.held_out_size < 0:
            raise InputError(f"--held-out-size: expected 0 (none) or more, got {self.held_out_size}")
        if (total := self.train_size + self.held_out_size + self.test_size) > DIGITS:
            raise InputError(
                f"--train-size {self.train_size}, --held-out-size {self.held_out_size} and --test-size "
                f"{self.test_size} are {total} digits and there are {DIGITS}: lower one of them"
            )
        if self.scenario == "random" and not 0 < self.forget_size < self.train_size:
            raise InputError(
                f"--forget-fraction {self.forget_fraction} of {self.train_size} samples is {self.forget_size}: "
                "something must be forgotten and something kept"
            )
        check_count("--batch-size", self.batch_size)
        if self.batch_size > DIGITS:
            raise InputError(f"--batch-size: expected at most {DIGITS}, as many as there are, got {self.batch_size}")
        if self.epochs is None:
            object.__setattr__(self, "epochs", max(6, min(24, 24_000 // self.train_size)))
        check_count("--epochs", self.epochs)

    @property
    def forget_size(self) -> int:
        """Samples to forget in the scenario random."""
        return round(self.forget_fraction * self.train_size)

    @property
    def unseen_size(self) -> int:
        """Held-out samples that a method gets at least: those of a forgotten class are left out."""
        return self.held_out_size - (math.ceil(self.held_out_size / CLASSES) if self.scenario == "class" else 0)

    def describe(self) -> dict[str, Any]:
        """All of it, without what the scenario does not use."""
        unused = "forget_fraction" if self.scenario == "class" else "forget_class"
        return {name: value for name, value in asdict(self).items() if name != unused}
