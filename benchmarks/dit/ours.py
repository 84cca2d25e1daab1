"""This package's own pieces, put together as the Unlearner does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from benchmarks.dit.ways import SIDES, Bench, Way
from unlearn_ext import FisherDiagonal, SaliencyMask

__all__ = ["Ours"]


class Ours(Way):
    """
    Args:
        chunk: None: a batch's mean gradient, as released. Else exact gradients of samples, so many at once.
        in_backward: use and free gradients in the backward pass: in Fisher passes and retain steps, which no norm over
            all gradients clips.
    """

    def __init__(self, bench: Bench, chunk: int | None = None, in_backward: bool = False):
        super().__init__(bench)
        self.in_backward = in_backward
        self.options: dict[str, Any] = {"in_backward": in_backward}
        if chunk is not None:
            self.options.update(per_sample=True, chunk=chunk)

    def start_fisher(self) -> None:
        self.diagonals: dict[str, FisherDiagonal] = {}

    def fisher(self, side: str, batches: Sequence[Any]) -> None:
        if side not in self.diagonals:
            self.diagonals[side] = FisherDiagonal(self.bench.model, self.bench.task, **self.options)
        with self.bench.autocast():
            self.diagonals[side].measure(batches, name=side)

    def sums(self, side: str) -> dict[str, Tensor]:
        return self.diagonals[side].sums

    def mask(self) -> None:
        method = self.bench.method
        self.saliency = SaliencyMask.from_fisher(
            *(self.diagonals[side] for side in SIDES), gamma=method.gamma, eps=method.fisher_eps
        )

    def kept(self) -> dict[str, Tensor]:
        return self.saliency.unpack()

    def adopt(self, masks: dict[str, Tensor]) -> None:
        self.saliency = SaliencyMask.from_dict(masks)

    def start_steps(self) -> None:
        method = self.bench.method
        self.optimizer = method.make_optimizer(method.groups(self.bench.named.items()), self.saliency)

    def forget_step(self) -> None:
        bench = self.bench
        bench.method.forget_loss(bench.losses(bench.forget), 0).loss.backward()
        self.optimizer.forget_step()
        bench.clear()

    def retain_step(self) -> None:
        bench = self.bench
        loss = bench.method.retain_loss(bench.losses(bench.retain), 0)
        if self.in_backward:
            with self.optimizer.step_in_backward("retain"):
                loss.backward()
        else:
            loss.backward()
            self.optimizer.retain_step()
        bench.clear()
