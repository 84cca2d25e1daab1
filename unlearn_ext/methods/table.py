"""The table of methods, from what each states of itself."""

from __future__ import annotations

from collections.abc import Iterable

from .base import Method
from .row import ALL_TASKS, CLASSIFICATION, DIFFUSION

__all__ = ["markdown"]

_TASKS = {ALL_TASKS: "all", CLASSIFICATION: "classification", DIFFUSION: "diffusion"}


def markdown(methods: Iterable[type[Method]]) -> str:
    """One row for each method, as markdown, with a line break at the end."""
    lines = [
        "| method | saliency | forget term | retain term | geometry | tasks | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        row = method.row
        tasks = _TASKS.get(row.tasks, ", ".join(row.tasks))
        cells = (f"`{method.name}`", row.saliency, row.forget_term, row.retain_term, row.geometry, tasks, row.source)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
