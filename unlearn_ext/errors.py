"""What can go wrong through the user's input or data; every message is one sentence that says what to do."""

from __future__ import annotations

__all__ = ["InputError", "LostRankError", "NonFiniteError", "ProtectionError", "UnlearnError", "UnlearningWarning"]
__all__ += ["first_line", "is_out_of_memory"]


class UnlearnError(Exception):
    """Base of the errors that the command line prints without a traceback."""


class InputError(UnlearnError, ValueError):
    """An argument, a data set or a file does not fit."""


class NonFiniteError(UnlearnError, ArithmeticError):
    """A loss or a gradient is inf or NaN. The weights are those before the step: nothing was written."""


class LostRankError(UnlearnError, RuntimeError):
    """Another process of a run by several cannot be reached any more."""


class ProtectionError(UnlearnError, RuntimeError):
    """A protected weight has changed: something outside the optimizer wrote to it."""


class UnlearningWarning(UserWarning):
    """A run ended, and what was asked of it did not happen, or its settings or data make that likely. The same
    sentences stand in :attr:`Result.warnings`."""


def first_line(error: Exception) -> str:
    """Of what another library says, which may go on for pages; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or the CPU, which has no class for it."""
    name = type(error).__name__
    return name == "OutOfMemoryError" or (name == "RuntimeError" and "can't allocate memory" in str(error))
