"""SIGINT, SIGTERM and SIGHUP in a run: the iteration is finished and saved before the run ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch

from ..distributed.ranks import ALONE, Ranks
from ..errors import Interrupted, Terminated
from ..utils.warn import warn

__all__ = ["Stop", "stop_on_signals"]

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Stop:
    """A signal that has come, if one has.

    Attributes:
        waits: whether it waits for :meth:`end`; else it ends the run at once.
        number: of the signal.
    """

    def __init__(self, ranks: Ranks = ALONE):
        self.ranks = ranks
        self.waits = False
        self.number: int | None = None
        self.ended = False
        self._process = os.getpid()

    def handle(self, number: int, frame: object = None) -> None:
        """As a signal handler."""
        if os.getpid() != self._process:  # a forked child, such as a loader's worker
            if number != signal.SIGINT:  # which a terminal sends to all of them, and the run sees to them
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        again = self.number is not None
        self.number = self.number or number
        if not self.waits or (again and number == signal.SIGINT and self.ranks.size == 1):
            self.end("at once: what the iteration at hand has done is lost" if self.waits else "")

    def on_any_rank(self, device: torch.device) -> bool:
        """Whether a signal has come to any of the ranks; all of them ask together."""
        if self.ranks.size > 1:
            numbers = self.ranks.gather(torch.tensor([self.number or 0], device=device))
            self.number = int(numbers.max()) or None
        return self.number is not None

    def end(self, what: str, iteration: int | None = None, checkpoint: Path | None = None) -> NoReturn:
        """Raises Interrupted or Terminated; ``what`` tells where the run stands."""
        self.ended = True
        kind = Interrupted if self.number == signal.SIGINT else Terminated
        message = f"stopped by {signal.Signals(self.number).name}{what and ' ' + what}"
        # Python ends without a word where nothing catches these.
        warn(message)
        raise kind(message, 128 + self.number, iteration, checkpoint)


@contextlib.contextmanager
def stop_on_signals(ranks: Ranks = ALONE) -> Iterator[Stop]:
    """Signals raise Interrupted or Terminated within the block, or wait where :attr:`Stop.waits` is set.

    Handlers that somebody else has set, ignored signals (``nohup``) and other threads than the main one stay as they
    are. Afterwards the handlers are those from before.
    """
    stop = Stop(ranks)
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            current = signal.getsignal(number)
            if current in (signal.SIG_DFL, signal.default_int_handler) or _is_ours(current):
                before[number] = signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if stop.number is not None and not stop.ended:  # something else has ended the run
            signal.raise_signal(stop.number)


def _is_ours(handler: object) -> bool:
    return isinstance(getattr(handler, "__self__", None), Stop)
