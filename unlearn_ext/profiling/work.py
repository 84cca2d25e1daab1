"""One piece of work on a network's weights, and the ways to do it: ours, the memory's, and PyTorch's.

All ways work on the same tensors, so that none profits from a better place in memory. Before anything is timed, each
starts from the same numbers and must arrive at ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .loop import Pass

__all__ = ["IMPLEMENTATIONS", "MismatchError", "Run", "Work", "ways"]

IMPLEMENTATIONS = ("fused", "loop", "eager", "foreach", "torch_fused", "torch_compile")

Run = Callable[[], Any]


class MismatchError(RuntimeError):
    """A rival computes something else, so its time would say nothing."""


@dataclass
class Work:
    """Ways to do the same thing.

    Attributes:
        operator, rule, dtype: as in the rows of a result.
        shapes: of the weights.
        passes: the least that must move through memory.
        make: implementation -> the function that makes its run; a run does the work once.
        state: what a run may write to.
        result: what a run has made, from what it returned, as tensors to compare.
        reset: puts counts of steps back.
        triad: two float32 lists of the weights' shapes.
        tolerance: how far from ours a way may arrive, as a share of how far each tensor has moved.
    """

    operator: str
    rule: str
    dtype: torch.dtype
    device: torch.device
    passes: list[Pass]
    make: dict[str, Callable[[], Run]]
    state: list[Tensor]
    result: Callable[[Any], list[Tensor]]
    triad: tuple[list[Tensor], list[Tensor]]
    reset: Callable[[], None] = lambda: None
    tolerance: float = 1e-3

    @property
    def weights(self) -> int:
        return sum(t.numel() for t in self.triad[0])

    @property
    def tensors(self) -> int:
        return len(self.triad[0])

    @property
    def bytes(self) -> int:
        return sum(p.bytes for p in self.passes)

    def check(self, runs: dict[str, Run]) -> dict[str, float]:
        """Two runs in a row of each way from the same start; the tensors must differ from ours by a small share of how
        far they have moved.

        Returns:
            Seconds that each way's first run took, compilation included.

        Raises:
            MismatchError: says which way and how far.
        """
        seconds: dict[str, float] = {}
        tolerance = self.tolerance if self.dtype == torch.float32 else 5e-2  # half: a rounding that falls the other way
        before = [t.clone() for t in self.state]
        start = [t.clone() for t in self.result(None)] if self.state else []
        expected: list[Tensor] = []
        for name, run in runs.items():
            self.reset()
            started = time.perf_counter()
            run()
            seconds[name] = time.perf_counter() - started
            actual = self.result(run())
            if name == "loop":
                if not all(torch.equal(t, b) for t, b in zip(self.state, before, strict=True)):
                    raise MismatchError(f"{self.operator}: the loop changes what it should leave")
                continue
            if not expected:
                expected = [t.clone() for t in actual]
                start = start or [torch.zeros_like(t) for t in expected]
            worst = max(map(_share, actual, expected, start))
            if not worst <= tolerance:
                raise MismatchError(
                    f"{self.operator}, {self.rule}, {self.dtype}: {name} differs from ours by {worst:.1e} of the way"
                )
            for tensor, kept in zip(self.state, before, strict=True):
                tensor.copy_(kept)
        self.reset()
        if not any(not torch.equal(t, s) for t, s in zip(expected, start, strict=True)):
            raise MismatchError(f"{self.operator}: nothing has moved, so nothing was checked")
        return seconds


def _share(actual: Tensor, expected: Tensor, start: Tensor) -> float:
    actual, expected, start = actual.double(), expected.double(), start.double()
    off, way = float((actual - expected).norm()), float((expected - start).norm())
    return off / way if off else 0.0 if way else off


# Of more tensors torch.compile writes a program that takes its compiler minutes: it is timed only when asked for.
_COMPILED_TENSORS = 128


def ways(implementations: Sequence[str] | None, work: Work) -> list[str]:
    """Those asked for that this work has, ours first: the others are compared to it."""
    names = IMPLEMENTATIONS if implementations is None else ("fused", *implementations)
    if implementations is None and work.tensors > _COMPILED_TENSORS:
        names = tuple(name for name in names if name != "torch_compile")
    return [name for name in IMPLEMENTATIONS if name in names and name in work.make]
