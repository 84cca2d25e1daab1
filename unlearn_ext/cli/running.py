"""What every command has in common while it runs: ``~`` in paths, and signals that end it in order."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from .report import plain_console

__all__ = ["as_command"]


def as_command(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """A command whose paths may start with ``~``, and that says how to go on when a signal ends it.

    It exits with 130 after SIGINT (Ctrl-C), 143 after SIGTERM, 129 after SIGHUP.
    """

    @functools.wraps(function)
    def command(**arguments: Any) -> int | None:
        from .._files import user_path
        from .._signals import stop_on_signals
        from ..errors import Terminated

        paths = {name: user_path(value) for name, value in arguments.items() if isinstance(value, Path)}
        try:
            with stop_on_signals(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "stopped by SIG")  # which is said below
                return function(**{**arguments, **paths})
        except Terminated as stopped:
            message = stopped.message
            if stopped.checkpoint is not None:
                message = (
                    f"{message.partition(':')[0]}: go on with the same command and --resume-from-checkpoint latest"
                )
            elif stopped.iteration is not None:
                message = f"{message.partition(':')[0]}: nothing was saved; --checkpointing-steps makes runs go on"
            plain_console(stderr=True).print(message, soft_wrap=True)
            raise typer.Exit(stopped.exit_code) from None

    return command
