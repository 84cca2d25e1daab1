"""What every way to unlearn does, stage by stage, and what all of them share."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_ext.distributed.wrappers import trainable
from unlearn_ext.methods import SFRon
from unlearn_ext.tasks import Task

__all__ = ["SIDES", "Bench", "Passes", "Way"]

SIDES = ("forget", "retain")


@dataclass
class Bench:
    """A network, its losses, the settings, and one batch of each side to step on.

    Attributes:
        model: as a user hands it over; compiled, perhaps.
        method: the released settings.
        half: the dtype of autocast, or None for none.
    """

    model: nn.Module
    task: Task
    method: SFRon
    forget: Any
    retain: Any
    half: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.named = trainable(self.model)
        self.parameters = list(self.named.values())
        self.device = self.parameters[0].device

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.half, enabled=self.half is not None)

    def losses(self, batch: Any) -> Tensor:
        with self.autocast():
            return self.task.losses(self.model, batch)

    def fisher_loss(self, batch: Any) -> Tensor:
        with self.autocast():
            return self.task.fisher_losses(self.model, batch).mean()

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters]

    def clear(self) -> None:
        for p in self.parameters:
            p.grad = None


class Way(ABC):
    """One way through the stages. Forward and backward passes are the same for all."""

    def __init__(self, bench: Bench):
        self.bench = bench

    @abstractmethod
    def start_fisher(self) -> None:
        """Diagonals of nothing yet; memory for one is taken when its first batch comes."""

    @abstractmethod
    def fisher(self, side: str, batches: Sequence[Any]) -> None:
        """Adds these batches to a side's diagonal."""

    @abstractmethod
    def sums(self, side: str) -> dict[str, Tensor]:
        """A side's sums of squares by name."""

    @abstractmethod
    def mask(self) -> None:
        """Makes the mask from both diagonals."""

    @abstractmethod
    def kept(self) -> dict[str, Tensor]:
        """The mask as bool tensors by name."""

    def end_fisher(self) -> None:
        """Frees the diagonals."""
        self.diagonals: dict[str, Any] = {}

    @abstractmethod
    def adopt(self, masks: dict[str, Tensor]) -> None:
        """Takes a mask made elsewhere: bool tensors by name, on the host."""

    @abstractmethod
    def start_steps(self) -> None:
        """A fresh optimizer, and the mask where the steps look for it."""

    @abstractmethod
    def forget_step(self) -> None:
        """Forward, backward, mask, clip, step."""

    @abstractmethod
    def retain_step(self) -> None:
        """Forward, backward, step."""


class Passes(Way):
    """Forward and backward passes alone, which all ways make: what is left where the rest costs nothing."""

    def start_fisher(self) -> None:
        pass

    def fisher(self, side: str, batches: Sequence[Any]) -> None:
        for batch in batches:
            self.bench.fisher_loss(batch).backward()
            self.bench.clear()

    def sums(self, side: str) -> dict[str, Tensor]:
        return {}

    def mask(self) -> None:
        pass

    def kept(self) -> dict[str, Tensor]:
        return {}

    def adopt(self, masks: dict[str, Tensor]) -> None:
        pass

    def start_steps(self) -> None:
        pass

    def forget_step(self) -> None:
        self.bench.losses(self.bench.forget).mean().backward()
        self.bench.clear()

    def retain_step(self) -> None:
        self.bench.losses(self.bench.retain).mean().backward()
        self.bench.clear()
