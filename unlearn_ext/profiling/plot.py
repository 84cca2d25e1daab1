"""One picture: how much faster than PyTorch's ways, and how near to the memory's limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from .report import Measurement, in_words

__all__ = ["check_plot", "plot"]

_COLOURS = {
    "fused": "#0b6e4f",
    "loop": "#8d99ae",
    "eager": "#d1495b",
    "foreach": "#edae49",
    "torch_fused": "#00798c",
    "torch_compile": "#6a4c93",
}
# Additions, multiplications, divisions and roots for each weight, as csrc/math writes them.
_RULES = {"sgd": 2, "momentum": 4, "adam": 13, "adamw": 13}


def _flops(row: dict) -> float:
    rule = _RULES.get(row["rule"], 0) + 2  # and its decay
    per_weight = {
        "joint": 3 + rule + 3,  # both gradients scaled and added, and the slow weights
        "sequential": 2 + 1 + rule + 2 + 1 + rule + 3,
        "fisher": 3,
        "ratio_bits": 6,
        "top_bits": 1,
    }
    return per_weight[row["operator"]] * row["weights"]


def check_plot(path: Path) -> None:
    """Before anything is measured: a plot needs matplotlib, and a format that it knows."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise InputError('--plot needs matplotlib: pip install "unlearn_ext[bench]"') from None
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise InputError(f"--plot: expected a file name ending in .png, .pdf or .svg, got {path.name}")


def plot(path: Path, measurements: Sequence[Measurement], device: str, threads: int) -> None:
    """Bars of speed-ups, and a roofline with the triad's bandwidth as its roof."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.6 + 1.35 * max(len(measurements), 3)), layout="constrained")
    bars, roof = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_bars(bars, measurements)
    _draw_roofline(roof, measurements)
    figure.suptitle(f"{device}, {threads} thread{'s' if threads > 1 else ''}")
    from ..utils.files import atomic_path

    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=150)


def _title(measurement: Measurement) -> str:
    row = measurement.rows[0]
    what = " ".join(filter(None, (row["operator"], row["rule"], row["dtype"])))
    return f"{what}\n{measurement.label}, {in_words(row['weights'])}"


def _rivals(measurement: Measurement) -> list[dict]:
    return [row for row in measurement.rows if row["implementation"] not in ("fused", "loop")]


def _plain(axis, ticks: Sequence[float]) -> None:
    """Few ticks, and no powers of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_bars(axes, measurements: Sequence[Measurement]) -> None:
    position, ticks, named = 0.0, [], set()
    for measurement in measurements:
        rows = _rivals(measurement)
        if not rows:
            continue
        for offset, row in enumerate(rows):
            name, speedup = row["implementation"], row["speedup_of_fused"]
            label = None if name in named else name
            named.add(name)
            axes.barh(position + offset, speedup - 1, left=1, color=_COLOURS[name], height=0.8, label=label)
            axes.text(max(speedup, 1) * 1.05, position + offset, f"{speedup:.1f} ×", va="center", fontsize=8)
        ticks.append((position + (len(rows) - 1) / 2, _title(measurement)))
        position += len(rows) + 1
    axes.set_yticks(*zip(*ticks, strict=True), fontsize=8) if ticks else axes.set_yticks([])
    axes.invert_yaxis()
    speedups = [1.0, *(row["speedup_of_fused"] for measurement in measurements for row in _rivals(measurement))]
    axes.set_xscale("log")
    axes.set_xlim(min(0.8, 0.8 * min(speedups)), 1.6 * max(*speedups, 2))
    _plain(axes.xaxis, (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200))
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("fused is so many times as fast (medians)")
    axes.spines[["top", "right"]].set_visible(False)
    if named:
        axes.legend(fontsize=8, frameon=False, ncols=len(named), loc="lower left", bbox_to_anchor=(0, 1))


def _draw_roofline(axes, measurements: Sequence[Measurement]) -> None:
    bandwidth = max(measurement.triad_gb_per_s for measurement in measurements)
    points = [(row, _flops(row) / row["bytes"]) for m in measurements for row in m.rows]
    low, high = min(x for _, x in points) / 1.5, max(x for _, x in points) * 1.5
    named = set()
    for row, intensity in points:
        name = row["implementation"]
        axes.scatter(
            intensity,
            intensity * row["gb_per_s"],
            color=_COLOURS[name],
            marker="_" if name == "loop" else "o",
            s=150 if name == "loop" else 40 if name == "fused" else 18,
            label=None if name in named else name,
            zorder=3 if name == "fused" else 2,
        )
        named.add(name)
    for operator in dict.fromkeys(row["operator"] for row, _ in points):
        x, y = min((x, x * row["gb_per_s"]) for row, x in points if row["operator"] == operator)
        axes.annotate(operator, (x, y), xytext=(0, -14), textcoords="offset points", fontsize=8, ha="center")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.margins(y=0.15)
    axes.plot([low, high], [low * bandwidth, high * bandwidth], color="black", linewidth=1, zorder=1)
    axes.annotate(
        f"triad: {bandwidth:.0f} GB/s",
        (high, high * bandwidth),
        xytext=(-6, 2),
        textcoords="offset points",
        fontsize=8,
        ha="right",
        va="bottom",
    )
    _plain(axes.xaxis, (0.05, 0.1, 0.2, 0.3, 0.5, 1, 2))
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("billion operations per second")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
