"""A calibrated run's looks at forget and unseen data, and its way back to the best point met."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..methods.calibration import Calibration, spacing
from .averages import Averages
from .packing import copy_of, put
from .passes import Passes

__all__ = ["Calibrating"]


class Calibrating:
    """Calls a method's :class:`~unlearn_ext.methods.calibration.Calibration` with losses or hits of the same samples at
    every look, under the same noise if the task draws any, and keeps one copy of the weights, buffers and averages:
    those at the look of the smallest score."""

    def __init__(
        self, passes: Passes, calibration: Calibration, parameters: Sequence[Tensor], averages: Averages | None
    ):
        self.passes, self.calibration, self.parameters, self.averages = passes, calibration, parameters, averages
        self.best: dict[str, Any] | None = None
        self._kept: list[Tensor] = []
        self._batches: dict[str, list[Any]] = {}
        self._state: dict[str, Any] = {}
        self._every = calibration.every

    def start(self) -> None:
        """Before the run has drawn anything. The starting weights are a point to go back to."""
        passes, calibration = self.passes, self.calibration
        self._state = passes.random_state()
        self._batches = {name: passes.sample(name, calibration.samples) for name in ("forget", "unseen")}
        forget, unseen = self._look("forget"), self._look("unseen")
        calibration.start(unseen, passes.context.task.wrong_loss() if calibration.takes_hits else None)
        self._take(0, forget, unseen)
        if calibration.every is None:
            self._every = self._spacing()

    def _spacing(self) -> int:
        """From the sizes of the batches that looks take whole. A retain batch is taken to be as large as the largest
        forget batch; what is learned, and Fisher passes, are not counted as training."""
        method, task = self.passes.context.method, self.passes.context.task
        sizes = {name: [task.size(batch) for batch in batches] for name, batches in self._batches.items()}
        forgets, retains = (sum(map(at, range(method.iterations))) for at in (method.forgets_at, method.retains_at))
        trained = forgets * sum(sizes["forget"]) / len(sizes["forget"]) + retains * max(sizes["forget"])
        return spacing(method.iterations, trained, sum(map(sum, sizes.values())))

    def after(self, iteration: int, last: bool, entry: dict[str, Any]) -> bool:
        """Looks where one is due. Whether forgetting has come to where it should, so that the run may end."""
        if not last and iteration % self._every:
            return False
        found = self._look_after(iteration)
        entry["calibration"] = {key: value for key, value in found.items() if key != "iteration"}
        return found["met"]

    def finish(self, iteration: int) -> dict[str, Any]:
        """Goes back to the best look where the last is worse."""
        path = self.calibration.path
        if path[-1]["iteration"] != iteration:  # an evaluation has stopped the run
            self._look_after(iteration)
        best, last = self.best, path[-1]
        if back := best is not last:
            self._go_back()
        self._kept, self._batches = [], {}
        return {"path": path, "ended_at": best["iteration"], "went_back": back, "met": best["met"]}

    def _look_after(self, iteration: int) -> dict[str, Any]:
        try:
            return self._take(iteration, self._look("forget"), self._look("unseen"))
        except NonFiniteError as error:
            raise NonFiniteError(f"after iteration {iteration - 1}: {error}") from None

    def rescue(self, error: Exception) -> Exception:
        """Gives the model the best weights met, as far as there are any, and tells in the error which: a new one in the
        place of a NonFiniteError, and a note on any other."""
        if self.best is None:  # nothing has been changed yet
            return error
        try:
            self._go_back()
        except Exception:  # the model is another one, or the device has failed: the first error counts
            return error
        sentence = f"the model has gone back to its weights after {self.best['iteration']} iterations"
        if isinstance(error, NonFiniteError):
            return NonFiniteError(f"{error}; {sentence}")
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(sentence)
        return error

    def _take(self, iteration: int, forget: Tensor, unseen: Tensor) -> dict[str, Any]:
        found = self.calibration.look(iteration, forget, unseen)
        if self.best is None or self.calibration.order(found) <= self.calibration.order(self.best):
            self.best = found
            self._kept = [copy_of(tensor.detach()) for tensor in self._tensors()]
        return found

    @torch.no_grad()
    def _go_back(self) -> None:
        for tensor, kept in zip(self._tensors(), self._kept, strict=True):
            put(tensor, kept)

    def _look(self, name: str) -> Tensor:
        found = self.passes.look(self._batches[name], self.calibration.takes_hits, name, self._state)
        return found[: self.calibration.samples]

    def _tensors(self) -> list[Tensor]:
        averages = [] if self.averages is None else self.averages.tensors.values()
        return [*self.parameters, *self.passes.context.model.buffers(), *averages]
