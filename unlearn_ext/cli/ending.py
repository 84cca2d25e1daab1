"""How a command ends: warnings, exit codes and their reasons."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..utils.warn import PACKAGE
from .report import plain_console

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["EXIT_CODES", "UNMET", "demo_warnings", "end", "plain_warnings", "show_warnings"]

UNMET = 3
# Keys of a command's own warnings that mean that what was asked did not happen, beside those of Result.warnings.
_UNMET_WARNINGS = frozenset({"still_drawn", "still_known", "not_seen_before", "retained_lost", "not_judged", "failed"})
_said: set[str] = set()  # sentences that this process has printed
EXIT_CODES = (
    "Exit codes: 0 done, 1 an error (one sentence on stderr), 2 an option that does not exist or fit, 3 done but what "
    "was asked for did not happen or cannot be told (the last lines on stderr and the result's warnings say what), "
    "130, 143 and 129 ended by Ctrl-C, SIGTERM and SIGHUP."
)


def end(result_warnings: Mapping[str, str]) -> int:
    """The exit code of a command whose result has these warnings. Where it is 3, its reasons are the last lines on
    stderr, whether they were printed before or not."""
    reasons = [sentence for key, sentence in result_warnings.items() if _is_unmet(key)]
    for sentence in reasons:
        plain_console(stderr=True).print(f"exit code {UNMET}: {sentence}", soft_wrap=True)
    return UNMET if reasons else 0


def _is_unmet(key: str) -> bool:
    from ..run.signs import missed  # which loads torch: a command's help does not

    return missed([key]) or key.partition(" ")[0] in _UNMET_WARNINGS


def demo_warnings(what: str | None, before: float, after: float, of_run: Mapping[str, str]) -> dict[str, str]:
    """Of a demo: those of its run, and whether the forgotten digit is still known.

    Args:
        what: the forgotten digit in words; None where random samples were forgotten, which still look like others.
        before, after: accuracy on it.
        of_run: :attr:`Result.warnings`.
    """
    from ..jobs.unmet import still_drawn

    all_warnings, chance = dict(of_run), 1 / 10
    if what is not None and still_drawn(before, after, chance):
        all_warnings["still_known"] = (
            f"{what} was not forgotten: {100 * before:.1f} % before and {100 * after:.1f} % after"
        )
    elif what is not None and before <= chance:
        all_warnings["not_seen_before"] = f"nothing can be said of forgetting: {what} was not known before"
    return all_warnings


def show_warnings(result_warnings: Mapping[str, str], console: Console) -> None:
    """A sentence a line, without those that were printed when they arose or that :func:`end` prints."""
    for key, sentence in result_warnings.items():
        if sentence not in _said and not _is_unmet(key):
            console.print(f"warning: {sentence}", soft_wrap=True)


@contextlib.contextmanager
def plain_warnings(console: Console) -> Iterator[None]:
    """Warnings of runs become a sentence a line, without the place in the code and its text."""
    from ..errors import UnlearningWarning

    _said.clear()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def showwarning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not (issubclass(category, UnlearningWarning) or str(place[0]).startswith(PACKAGE)):
                show(message, category, *place, **more)
            elif str(message) not in _said:
                _said.add(str(message))
                console.print(f"warning: {message}", soft_wrap=True)

        warnings.showwarning = showwarning
        warnings.simplefilter("always", UnlearningWarning)
        yield
