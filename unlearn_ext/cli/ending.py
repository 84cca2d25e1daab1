"""How a command ends: exit codes, and an interrupt that says how to go on."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .._signs import missed

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["EXIT_CODES", "UNMET", "demo_warnings", "exit_code", "plain_warnings", "show_warnings"]

UNMET = 3
# Keys of a command's own warnings that mean that what was asked did not happen, beside those of Result.warnings.
_UNMET_WARNINGS = frozenset({"still_drawn", "still_known", "retained_lost", "not_judged"})
_said: set[str] = set()  # sentences that this process has printed
EXIT_CODES = (
    "Exit codes: 0 done, 1 an error (one sentence on stderr), 2 an option that does not exist or fit, 3 done but what "
    "was asked for did not happen (the result's warnings say what), 130, 143 and 129 ended by Ctrl-C, SIGTERM and "
    "SIGHUP."
)


def exit_code(found: Mapping[str, str]) -> int:
    """Of a command whose result has these warnings."""
    return UNMET if missed(found) or _UNMET_WARNINGS & found.keys() else 0


def demo_warnings(what: str | None, before: float, after: float, of_run: Mapping[str, str]) -> dict[str, str]:
    """Of a demo: those of its run, and whether the forgotten digit is still known.

    Args:
        what: the forgotten digit in words; None where random samples were forgotten, which still look like others.
        before, after: accuracy on it.
        of_run: :attr:`Result.warnings`.
    """
    from ..diffusion.unmet import still_drawn

    found = dict(of_run)
    if what is not None and still_drawn(before, after, 1 / 10):
        found["still_known"] = f"{what} was not forgotten: {100 * before:.1f} % before and {100 * after:.1f} % after"
    return found


def show_warnings(found: Mapping[str, str], console: Console) -> None:
    """A sentence a line, without those that were printed when they arose."""
    for sentence in found.values():
        if sentence not in _said:
            console.print(f"warning: {sentence}")


@contextlib.contextmanager
def plain_warnings(console: Console) -> Iterator[None]:
    """Warnings of runs become a sentence a line, without the place in the code and its text."""
    from ..errors import UnlearningWarning

    _said.clear()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def showwarning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, UnlearningWarning):
                show(message, category, *place, **more)
            elif str(message) not in _said:
                _said.add(str(message))
                console.print(f"warning: {message}", soft_wrap=True)

        warnings.showwarning = showwarning
        warnings.simplefilter("always", UnlearningWarning)
        yield
