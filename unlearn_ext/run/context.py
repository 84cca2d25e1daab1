"""What the parts of a run have in common, handed down once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.modes import PRECISIONS, without_float16
from ..distributed.ranks import Ranks
from ..methods import Method
from ..tasks import Task, check_per_sample

__all__ = ["RunContext"]


@dataclass(frozen=True)
class RunContext:
    """Model, task, method, ranks, device, precision and options of one run, as the model was when it began.

    Attributes:
        named: the trained weights.
        task_settings: what a checkpoint says of the task.
        identity: what else a run must have in common with the one that it resumes.

    The other attributes are those of :class:`~unlearn_ext.Unlearner`.
    """

    model: nn.Module
    task: Task
    method: Method
    ranks: Ranks
    device: torch.device
    named: list[tuple[str, Tensor]]
    task_settings: dict[str, Any]
    identity: dict[str, str]
    mixed_precision: str
    gradient_accumulation_steps: int
    ema_decay: float | None
    split_batches: bool
    optimizer_in_backward: bool
    fisher_storage: str

    def settings(self) -> dict[str, Any]:
        """What a run must have in common with the one that it resumes."""
        method = {"method": type(self.method).__name__, **self.method.settings()}
        return {
            **method,
            **self.task_settings,
            "mixed_precision": self.mixed_precision,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "ema_decay": self.ema_decay,
            "split_batches": self.split_batches,
            **self.identity,
        }

    @contextlib.contextmanager
    def fisher_autocast(self) -> Iterator[None]:
        with self.autocast(), without_float16(self.device.type):
            yield

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        half = PRECISIONS[self.mixed_precision]
        # Steps make its half copies of weights stale, and torch drops them only where no other autocast is around it.
        # Those of a backward pass that computes activations again are dropped before the next forward pass.
        torch.clear_autocast_cache()
        with torch.autocast(self.device.type, dtype=half, enabled=half is not None):
            yield
        torch.clear_autocast_cache()

    def losses(self, batch: Any, count: int, replacement: bool = False) -> Tensor:
        """Of a prepared batch of ``count`` samples; 0: of one, that counts nothing."""
        with self.autocast():
            losses = (self.task.replacement_losses if replacement else self.task.losses)(self.model, batch)
        check_per_sample(losses, max(count, 1))
        return losses

    def hits(self, batch: Any, count: int) -> Tensor:
        with self.autocast():
            hits = self.task.hits(self.model, batch)
        check_per_sample(hits, count, "hits")
        return hits

    def losses_and_distances(self, batch: Any, count: int, teacher: nn.Module, side: str) -> tuple[Tensor, Tensor]:
        with self.autocast():
            settings = self.method.distance_settings(side)
            losses, distances = self.task.losses_and_distances(self.model, teacher, batch, **settings)
        check_per_sample(losses, max(count, 1))
        check_per_sample(distances, max(count, 1), "distance")
        return losses, distances
