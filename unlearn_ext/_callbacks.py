"""What a run calls of its user's: the evaluation and the display of progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ._modes import evaluating
from ._process import CallerModes

__all__ = ["Callbacks", "Progress"]

Progress = Callable[[str, int, int | None], None]


class Callbacks:
    """Calls both in the modes (gradients, autocast) in which the run was called."""

    def __init__(
        self,
        evaluate: Callable[[nn.Module, int], Any] | None,
        evaluate_every: int | None,
        progress: Progress | None,
        modes: CallerModes,
    ):
        self._evaluate, self._every, self._progress, self._modes = evaluate, evaluate_every, progress, modes

    def evaluates_at(self, iterations: int) -> bool:
        return self._evaluate is not None and iterations % self._every == 0

    def evaluate(self, model: nn.Module, iterations: int) -> Any:
        with evaluating(model), self._modes.again():
            return self._evaluate(model, iterations)

    def progress(self, stage: str, done: int, total: int | None) -> None:
        if self._progress is not None:
            with self._modes.again():
                self._progress(stage, done, total)
