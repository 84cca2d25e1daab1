"""What every command has in common while it runs: signals end it in order."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import typer

from .report import plain_console

__all__ = ["as_command"]


def as_command(function: Callable[..., int | None], advice: str) -> Callable[..., int | None]:
    """A command that says how to go on when a signal ends it.

    It exits with 130 after SIGINT (Ctrl-C), 143 after SIGTERM, 129 after SIGHUP.

    Args:
        advice: how to go on, unless the exception has an ``advice`` that knows more.
    """

    @functools.wraps(function)
    def command(**arguments: Any) -> int | None:
        from ..errors import Terminated
        from ..run.signals import stop_on_signals

        try:
            with stop_on_signals(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "stopped by SIG")  # which is said below
                return function(**arguments)
        except Terminated as stopped:
            what = stopped.message.partition(":")[0]
            plain_console(stderr=True).print(f"{what}: {getattr(stopped, 'advice', advice)}", soft_wrap=True)
            raise typer.Exit(stopped.exit_code) from None

    return command
