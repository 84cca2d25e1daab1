"""Progress bars on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from ..utils.streams import is_unicode

__all__ = ["stages", "two_bars"]


@contextlib.contextmanager
def stages(console: Console) -> Iterator[Callable[[str, int, int | None], None]]:
    """Yields ``report(stage, done, total)``; a bar appears when its stage begins and stays when it is done."""
    with Progress(*_columns(console), console=console) as bars:
        tasks: dict[str, int] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


@contextlib.contextmanager
def two_bars(
    console: Console, whole: str, count: int
) -> Iterator[tuple[Callable[[str, int, int | None], None], Callable[[], None]]]:
    """Yields ``report(stage, done, total)``, of the stage that runs, and ``advance()``, of the whole."""
    with Progress(*_columns(console), console=console, transient=True) as bars:
        overall, current = bars.add_task(whole, total=count), bars.add_task("", total=None)

        def report(stage: str, done: int, total: int | None) -> None:
            if bars.tasks[current].description != stage:
                bars.reset(current, description=stage)
            bars.update(current, completed=done, total=total)

        yield report, lambda: bars.advance(overall)


def _columns(console: Console) -> tuple[ProgressColumn, ...]:
    spinner = SpinnerColumn(finished_text="✓") if is_unicode(console.encoding) else SpinnerColumn("line")
    return (
        spinner,
        TextColumn("{task.description:<30}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
