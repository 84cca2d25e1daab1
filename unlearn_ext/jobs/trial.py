"""Pieces of a run, tried with made-up inputs: the bytes that they hold at once, and the seconds that they take."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import is_out_of_memory
from ..utils.grad_hooks import consuming

__all__ = ["Trial", "held_tensors", "try_batch", "try_samples"]

_LONG = 2.0  # seconds; on the CPU a run that took as long is not repeated to be timed
_CHEAP = 2.0  # seconds; as many samples as should take less are tried at once


@dataclass(frozen=True)
class Trial:
    """What one batch took.

    Attributes:
        peak: the most bytes of tensors alive at once on the model's device, weights and buffers not among them.
        seconds: of wall time.
    """

    peak: int
    seconds: float

    def scaled(self, factor: float) -> Trial:
        """Of a batch so many times as large: bytes and seconds grow in proportion."""
        return Trial(round(self.peak * factor), self.seconds * factor)


def held_tensors(networks: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters and buffers, each once, whichever network has it."""
    tensors = {id(t): t for network in networks for t in (*network.parameters(), *network.buffers())}
    return list(tensors.values())


def try_batch(
    model: nn.Module,
    loss: Callable[[], Tensor],
    others: Iterable[nn.Module] = (),
    *,
    batches: int = 1,
    passes_in_backward: int = 0,
) -> Trial:
    """Runs ``loss`` forward and backward, and leaves no gradient.

    ``peak`` includes gradients: while the backward pass makes them, it frees what the forward pass kept, so the most
    that is alive is less than the sum of both.

    Args:
        others: networks whose weights are not counted either.
        batches: in a step. From the second on, there are gradients already, and what is added to one is there beside.
            Of them all, two are tried, and the seconds are those of one.
        passes_in_backward: 1 or 2 (over one graph) where each gradient is used in the backward pass and freed.
    """
    parameters = list(model.parameters())

    def step() -> None:
        value = loss()
        if not passes_in_backward:
            value.backward()
        for left in reversed(range(passes_in_backward)):
            with consuming(parameters, str, lambda i, gradient: None):
                value.backward(retain_graph=left > 0)

    def steps() -> None:
        for _ in range(min(batches, 2)):
            step()

    def clear() -> None:
        for p in model.parameters():
            p.grad = None

    watched = _watched(steps, model, others)
    clear()
    try:
        seconds = watched.seconds / min(batches, 2)
        return Trial(watched.peak, _seconds(step, model, seconds))
    finally:
        clear()


def try_samples(run: Callable[[int], Any], count: int, model: nn.Module, others: Iterable[nn.Module] = ()) -> Trial:
    """Of ``run(count)``, which works on so many samples at once and keeps nothing for a backward pass.

    First one sample is tried, then as many as should be done within two seconds, up to all of them, until that is less
    than twice as many as before; the figures of the last trial are multiplied.
    """
    size, trial = 1, _try(partial(run, 1), model, others)
    while size < count:
        larger = min(count, int(size * _CHEAP / max(trial.seconds, 1e-6)))
        if larger <= size or larger < min(2 * size, count):
            break
        try:
            trial = _try(partial(run, larger), model, others)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break  # the larger trial does not fit: the smaller one is scaled up, and shows it
        size = larger
    return trial.scaled(count / size)


def _try(run: Callable[[], Any], model: nn.Module, others: Iterable[nn.Module]) -> Trial:
    watched = _watched(run, model, others)
    return Trial(watched.peak, _seconds(run, model, watched.seconds))


def _watched(run: Callable[[], Any], model: nn.Module, others: Iterable[nn.Module]) -> Trial:
    device = next(model.parameters()).device
    live = _LiveBytes(device, held_tensors([model, *others]))
    started = time.perf_counter()
    with live:
        run()
    _wait(device)
    return Trial(live.peak, time.perf_counter() - started)


def _seconds(run: Callable[[], Any], model: nn.Module, first: float) -> float:
    """Of another run, which neither is watched nor has anything to load; of the first one where that took long."""
    device = next(model.parameters()).device
    if device.type == "cpu" and first >= _LONG:
        return first
    started = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _LiveBytes(TorchDispatchMode):
    """Counts storages that operators are given or return, from then until they are freed.

    What an operator takes and gives back within itself is not seen.

    Args:
        device: whose storages are counted.
        held: tensors that are there anyway, and not counted.
    """

    def __init__(self, device: torch.device, held: Iterable[Tensor]):
        super().__init__()
        self.device, self.peak, self._now = device, 0, 0
        self._held = {t.untyped_storage()._cdata for t in held}
        self._alive: dict[int, tuple[weakref.ref, int]] = {}

    def lap(self) -> int:
        """The peak so far; the next one starts from what is alive now."""
        peak, self.peak = self.peak, self._now
        return peak

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, Tensor) and value.device == self.device and value.layout == torch.strided:
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._held:
            return
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, partial(self._forget, key)), 0
        reference, before = self._alive[key]  # which differs where an operator has resized it
        self._alive[key] = reference, size
        self._now += size - before
        self.peak = max(self.peak, self._now)

    def _forget(self, key: int, reference: weakref.ref) -> None:
        self._now -= self._alive.pop(key)[1]
