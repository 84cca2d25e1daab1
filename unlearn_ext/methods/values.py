"""What methods give and are given: losses, and defaults that give way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Default", "DefaultWord", "ForgetLoss", "plain_default"]


class Default(float):
    """A number that nobody gave: a default that gives way where a given one would clash."""


class DefaultWord(str):
    """A word that nobody gave."""


def plain_default(value: Any) -> Any:
    """Of Python's own classes, which files hold."""
    return float(value) if isinstance(value, Default) else str(value) if isinstance(value, DefaultWord) else value


@dataclass
class ForgetLoss:
    """A forget batch's scalar to minimise, and what the history shows of it (0-d tensors, read at log points).

    Attributes:
        loss: a weighted mean over the batch.
        largest_share: of one sample in it.
        weight: the sum of the samples' weights, detached, by which this mean counts beside those of other batches when
            gradients are accumulated; None: the number of samples.
    """

    loss: Tensor
    largest_share: Tensor | None = None
    weight: Tensor | None = None
