"""What can go wrong through the user's input or data; every message is one sentence that says what to do."""

from __future__ import annotations

from pathlib import Path

__all__ = ["DamagedError", "InputError", "Interrupted", "LostRankError", "NonFiniteError", "ProtectionError"]
__all__ += ["Terminated", "UnlearnError", "UnlearningWarning", "WriteError", "first_line", "is_out_of_memory"]


class UnlearnError(Exception):
    """Base of the errors that the command line prints without a traceback."""


class InputError(UnlearnError, ValueError):
    """An argument, a data set or a file does not fit."""


class DamagedError(InputError):
    """A file is not as it was written."""


class WriteError(UnlearnError, OSError):
    """A file cannot be written: the disk is full, the folder is gone, too many files are open."""

    def __init__(self, message: str, cause: BaseException | None = None):
        super().__init__(message)
        self.message = message
        self.errno, self.strerror = getattr(cause, "errno", None), getattr(cause, "strerror", None)

    def __str__(self) -> str:
        return self.message


class NonFiniteError(UnlearnError, ArithmeticError):
    """A loss or a gradient is inf or NaN. The weights are those before the step: nothing was written."""


class LostRankError(UnlearnError, RuntimeError):
    """Another process of a run by several cannot be reached any more."""


class ProtectionError(UnlearnError, RuntimeError):
    """A protected weight has changed: something outside the optimizer wrote to it."""


class UnlearningWarning(UserWarning):
    """A run goes on, or has ended, otherwise than was asked for."""


class Terminated(SystemExit):
    """A run was ended by SIGTERM or SIGHUP. Where nothing catches it the process exits with 143 or 129.

    Attributes:
        message: where the run stands, and how to go on.
        exit_code: 128 plus the signal's number, as shells report it.
        iteration: how many iterations are done; None before the first pass is over.
        checkpoint: what was saved of them; None where the run makes no checkpoints.
    """

    def __init__(self, message: str, exit_code: int, iteration: int | None = None, checkpoint: Path | None = None):
        super().__init__(message)
        self.message, self.exit_code, self.iteration, self.checkpoint = message, exit_code, iteration, checkpoint
        self.code = exit_code

    def __str__(self) -> str:
        return self.message


class Interrupted(Terminated, KeyboardInterrupt):
    """A run was ended by SIGINT (Ctrl-C). Where nothing catches it the process exits with 130."""


def first_line(error: Exception) -> str:
    """Of what another library says, which may go on for pages; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or the CPU, which has no class for it."""
    name = type(error).__name__
    return name == "OutOfMemoryError" or (name == "RuntimeError" and "can't allocate memory" in str(error))
