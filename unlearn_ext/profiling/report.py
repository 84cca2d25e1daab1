"""Measured rows, the document that holds them, and the table that shows them."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..utils.device import device_name
from .loop import loop_holds, triad, triad_bytes
from .timing import interleaved, quantile
from .work import Work, ways

__all__ = ["FIELDS", "Measurement", "document", "in_words", "measure", "show", "write"]

FIELDS = (
    "operator",
    "rule",
    "dtype",
    "weights",
    "tensors",
    "implementation",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "bytes",
    "gb_per_s",
    "fraction_of_loop",
    "speedup_of_fused",
)


@dataclass
class Measurement:
    """Rows of one work, and what the memory allowed meanwhile.

    Attributes:
        label: what the weights are of.
        rows: as in the JSON document; ``fraction_of_loop`` is None where the loop itself fell short of the triad.
        triad_gb_per_s: the triad's speed in the same run.
        compile_seconds: what the first call of ``torch_compile`` took, which no row counts.
    """

    label: str
    rows: list[dict[str, Any]]
    triad_gb_per_s: float
    compile_seconds: float | None = None


def measure(
    label: str,
    work: Work,
    implementations: Sequence[str] | None = None,
    repeats: int = 21,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measurement:
    """Checks every way to do the work against ours, then times them in turns.

    Raises:
        MismatchError: a way computes something else.
    """
    with torch.no_grad():
        runs = {name: work.make[name]() for name in ways(implementations, work)}
        if "torch_compile" in runs:
            torch.compiler.reset()
        first_calls = work.check(runs)
        seconds = interleaved({**runs, "triad": triad(*work.triad)}, repeats, work.device, progress)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    triad_speed = triad_bytes(work.triad[0]) / medians["triad"]
    holds = "loop" in medians and loop_holds(work.passes, medians["loop"], triad_speed)
    rows = []
    for name in runs:
        p20, p50, p80 = (quantile(seconds[name], q) for q in (0.2, 0.5, 0.8))
        values = (
            work.operator,
            work.rule,
            str(work.dtype).removeprefix("torch."),
            work.weights,
            work.tensors,
            name,
            1e3 * p20,
            1e3 * p50,
            1e3 * p80,
            work.bytes,
            work.bytes / p50 / 1e9,
            medians["loop"] / p50 if holds else None,
            p50 / medians["fused"],
        )
        rows.append(dict(zip(FIELDS, values, strict=True)))
    return Measurement(label, rows, triad_speed / 1e9, first_calls.get("torch_compile"))


def in_words(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 100_000 else f"{count:,}"


def document(measurements: Sequence[Measurement], device: torch.device | str = "cpu") -> dict[str, Any]:
    """What ``--json`` writes."""
    from ..version import __version__

    return {
        "device": device_name(device),
        "versions": {"unlearn_ext": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "rows": [row for measurement in measurements for row in measurement.rows],
    }


def write(path: Path, contents: dict[str, Any]) -> None:
    from ..utils.files import atomic_path

    with atomic_path(path) as partial:
        partial.write_text(json.dumps(contents, indent=1) + "\n")


def show(measurements: Sequence[Measurement], console: Console | None = None) -> None:
    """A table of at most 80 columns for each measurement."""
    console = console or Console(width=80, highlight=False)
    for measurement in measurements:
        first = measurement.rows[0]
        what = " ".join(filter(None, (first["operator"], first["rule"])))
        table = Table(
            title=f"{what}, {first['dtype']}: {in_words(first['weights'])} weights in {first['tensors']} tensors "
            f"({measurement.label})"
        )
        table.add_column("implementation")
        for name in ("p20 ms", "p50 ms", "p80 ms", "GB/s", "of loop", "fused is"):
            table.add_column(name, justify="right")
        void = "void" if any(row["implementation"] == "loop" for row in measurement.rows) else ""
        for row in measurement.rows:
            fraction = row["fraction_of_loop"]
            speedup = f"{row['speedup_of_fused']:.2f} ×"
            cells = [f"{row[key]:.2f}" for key in ("p20_ms", "p50_ms", "p80_ms")]
            cells += [f"{row['gb_per_s']:.1f}", (void if fraction is None else f"{fraction:.2f}")]
            table.add_row(row["implementation"], *cells, "" if row["implementation"] == "fused" else speedup)
        console.print(table)
        note = f"triad in the same run: {measurement.triad_gb_per_s:.1f} GB/s"
        if any(row["implementation"] == "loop" and row["fraction_of_loop"] is None for row in measurement.rows):
            note += "; the loop fell short of it, so no comparison to the loop is made"
        console.print(note, style="dim")
        if measurement.compile_seconds is not None:
            console.print(f"torch_compile compiled for {measurement.compile_seconds:.1f} s before", style="dim")
    console.print("fused is: how many times as fast as that row, by medians.", style="dim")
