"""A calibrated run's looks at forget and unseen data, and its way back to the best point met."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .methods.calibration import Calibration

if TYPE_CHECKING:
    from ._loop import Loop

__all__ = ["Calibrating"]


class Calibrating:
    """Calls a method's :class:`~unlearn_ext.methods.calibration.Calibration` with losses, and keeps one copy of the
    weights and buffers: those at the look of the smallest score."""

    def __init__(self, loop: Loop, calibration: Calibration):
        self.loop, self.calibration = loop, calibration
        self.best: dict[str, Any] | None = None
        self._kept: list[Tensor] = []

    def start(self) -> None:
        self.calibration.start(self.loop.look("unseen", 4 * self.calibration.samples))

    def after(self, iteration: int, last: bool, entry: dict[str, Any]) -> bool:
        """Looks where one is due. Whether forgetting has reached unseen data, so that the run may end."""
        calibration = self.calibration
        if not last and iteration % calibration.every:
            return False
        found = calibration.look(
            iteration, *(self.loop.look(name, calibration.samples) for name in ("forget", "unseen"))
        )
        entry["calibration"] = {key: value for key, value in found.items() if key != "iteration"}
        if self.best is None or found["score"] <= self.best["score"]:
            self.best = found
            self._kept = [tensor.detach().clone() for tensor in self._tensors()]
        return found["met"]

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        """Goes back to the best look where the last is worse by more than looks differ by chance."""
        path = self.calibration.path
        if not path or path[-1]["iteration"] != self.loop.iteration:  # an evaluation has stopped the run
            self.after(self.loop.iteration, True, {})
        best = self.best
        chance = self.calibration.critical(self.calibration.samples, self.calibration.samples) / 2.0
        back = best is not path[-1] and path[-1]["score"] - best["score"] > chance
        if back:
            for tensor, kept in zip(self._tensors(), self._kept, strict=True):
                tensor.copy_(kept)
        self._kept = []
        end = best if back else path[-1]
        return {"path": path, "ended_at": end["iteration"], "went_back": back, "met": end["met"]}

    def _tensors(self) -> list[Tensor]:
        return [*self.loop.parameters, *self.loop.model.buffers()]
