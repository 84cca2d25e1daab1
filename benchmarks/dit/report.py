"""The document and the tables of a measurement."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.dit import network
from benchmarks.dit.bars import bars, condition
from benchmarks.dit.measure import Measured
from benchmarks.dit.memory import COUNTED
from unlearn_ext.profiling.report import in_words
from unlearn_ext.utils.device import device_name

__all__ = ["document", "show"]

_TITLES = {
    "fisher": "Fisher, a batch",
    "mask": "mask",
    "forget": "forget step: forward, backward, mask, clip, step",
    "retain": "retain step: forward, backward, step",
    "iteration": "whole iteration",
}


def document(measured: Measured, name: str) -> dict[str, Any]:
    """What ``--json`` writes; ``name`` is the network's."""
    from unlearn_ext import __version__

    settings = measured.settings
    return {
        "device": device_name(settings.device),
        "versions": {"unlearn_ext": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "network": {
            "name": name,
            "layout": settings.layout,
            "weights": measured.weights,
            "tensors": measured.tensors,
            **asdict(settings.shape),
        },
        "dtype": settings.dtype,
        "batch_size": settings.batch_size,
        "samples": settings.samples,
        "chunk": settings.chunk,
        "checkpointing": settings.checkpointing,
        "tuned_adamw": measured.adamw,
        "memory_counted": COUNTED[settings.device.type],
        "rows": measured.rows(),
        "bars": [bar.document() for bar in bars(measured)],
    }


def show(measured: Measured, name: str, console: Console | None = None) -> None:
    """Tables of at most 80 columns, and which bars hold."""
    console = console or Console(width=80, highlight=False)
    settings, shape = measured.settings, measured.settings.shape
    console.print(
        f"{name} of {shape.depth} blocks of width {shape.width}, {settings.layout} layout "
        f"({network.LAYOUTS[settings.layout]}): {in_words(measured.weights)} weights in {measured.tensors} tensors; "
        f"{settings.dtype}, batches of {settings.batch_size}"
        + (", gradient checkpointing" if settings.checkpointing else "")
    )
    rows = measured.rows()
    for stage in measured.seconds:
        table = Table(title=_TITLES[stage])
        table.add_column("implementation")
        for column in ("p20 ms", "p50 ms", "p80 ms", "per s", "peak MB", "ours is"):
            table.add_column(column, justify="right")
        for row in rows:
            if row["stage"] == stage:
                cells = [f"{row[key]:.2f}" for key in ("p20_ms", "p50_ms", "p80_ms", "per_second")]
                peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
                own = "" if row["implementation"] == "ours" else f"{row['speedup_of_ours']:.2f} ×"
                table.add_row(row["implementation"], *cells, peak, own)
        console.print(table)
        for row in rows:
            if row["stage"] == stage and row["first_call_s"] is not None:
                console.print(f"{row['implementation']}: first call {row['first_call_s']:.1f} s, compilation included")
    notes = ["ours is: how many times as fast as that row, by medians.", f"tuned takes AdamW({measured.adamw}=True)."]
    if any("passes" in ways for ways in measured.seconds.values()):
        notes.append("passes: forward and backward alone, which all ways but the compiled ones have in common.")
    if "fisher" in measured.seconds:
        notes.append("ours, per sample: of a sample, in one batch of as many as the others have batches of 1.")
    notes.append(f"Memory: {COUNTED[settings.device.type]}; with weights, and what earlier stages left.")
    console.print("\n".join(notes), style="dim")
    if (other := condition(measured, torch.get_num_threads())) is not None:
        console.print(other)
    for bar in bars(measured):
        console.print(str(bar))
