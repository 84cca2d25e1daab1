"""``unlearn-ext profile``: what an unlearning iteration costs a network's weights, in time and memory."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .device import checked_device
from .report import check_file, plain_console

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..profiling.report import Measurement
    from ..profiling.shapes import Shape

__all__ = ["profile"]


class Rule(str, Enum):
    sgd = "sgd"
    momentum = "momentum"
    adam = "adam"
    adamw = "adamw"


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def profile(
    shapes: Annotated[
        str | None, typer.Option(help="A known network, 300x1000 (tensors, weights in each), or a .safetensors file.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="module:function that returns your nn.Module.")] = None,
    rule: Annotated[Rule, typer.Option(help="The optimizer's rule.")] = Rule.adamw,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and gradients.")] = Dtype.float32,
    weights: Annotated[
        int | None, typer.Option(min=1, max=10**12, help="About how many; default on the CPU: 40 M.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Default: PyTorch's choice.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    repeats: Annotated[int | None, typer.Option(min=1, help="Default: some seconds' worth.")] = None,
    implementations: Annotated[
        str, typer.Option(help="Rivals, with commas: loop, eager, foreach, torch_fused, torch_compile.")
    ] = "loop,eager,torch_fused",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw speed-ups and a roofline (.png).")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a chrome trace of one iteration, ranges named.")] = None,
) -> int:
    """Measure the weight work of one SFR-on iteration on the shapes of your network.

    Made-up weights and gradients of the given shapes go through the masked
    norm, the forget step, the retain step and the slow weights. Predicted is
    the time that memory alone would take, bytes over the triad's bandwidth,
    and the memory that the tensors take; both stand beside what is measured.
    """
    import torch

    from ..profiling import memory, steps
    from ..profiling.report import document, in_words, measure, show, write
    from ..profiling.shapes import count, cut
    from ..profiling.timing import repeats_for
    from ..utils.device import device_name

    place = torch.device(checked_device(device))
    for option, path in (("--json", json_file), ("--plot", plot_file), ("--trace", trace)):
        check_file(option, path)
    if plot_file is not None:
        from ..profiling.plot import check_plot, plot

        check_plot(plot_file)
    label, whole = _shapes(shapes, model)
    limit = weights or (40_000_000 if place.type == "cpu" else None)
    kept, kind = cut(whole, limit), getattr(torch, dtype.value)
    memory.check_room(kept, rule.value, kind, place)
    if threads is not None:
        torch.set_num_threads(threads)
    names = _implementations(implementations)
    with plain_console(stderr=True).status("measuring"):
        taken = memory.measured(kept, rule.value, kind, place)
        work = steps.sequential(kept, rule.value, kind, place)
        measurement = measure(label, work, names, repeats or repeats_for(count(kept)))
        del work
        passes = _time_passes(kept, rule.value, kind, place, repeats or 11)
    console = plain_console(json_file=json_file)
    show([measurement], console)
    timed, sizes = _predict(measurement, passes), memory.predicted(kept, rule.value, kind)
    _show_passes(timed, console)
    _show_memory(sizes, taken, console)
    if count(kept) < count(whole):
        console.print(
            f"Measured on the first {in_words(count(kept))} of {in_words(count(whole))} weights; the whole network "
            f"takes {count(whole) / count(kept):.1f} times as long and as much.",
        )
    if json_file is not None:
        in_memory = {"predicted_bytes": {**sizes, "peak": sum(sizes.values())}, "measured_peak_bytes": taken}
        write(json_file, {**document([measurement], place), "passes": timed, "memory": in_memory})
    if plot_file is not None:
        plot(plot_file, [measurement], device_name(place), torch.get_num_threads())
    if trace is not None:
        _write_trace(trace, kept, rule.value, kind, place)
        console.print(f"trace, for chrome://tracing or ui.perfetto.dev: {trace}", style="dim")
    return 0


# --- Input --------------------------------------------------------------------------------------------------


def _implementations(text: str) -> list[str]:
    from ..errors import InputError
    from ..profiling.work import IMPLEMENTATIONS

    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise InputError(f"--implementations: expected some of {', '.join(IMPLEMENTATIONS)}, got {name!r}")
    return names


def _shapes(name: str | None, model: str | None) -> tuple[str, list[Shape]]:
    from ..errors import InputError
    from ..profiling.shapes import named

    if name is not None and model is not None:
        raise InputError("--shapes and --model both say what to measure: give one of them")
    if model is None:
        name = name or "dit-xl-2"
        return Path(name).name, named(name)
    return model, _model_shapes(model)


def _model_shapes(name: str) -> list[Shape]:
    """The trainable parameters of the user's network, which is made on the meta device where it can be."""
    import importlib
    import sys

    import torch

    from ..errors import InputError

    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise InputError(f"--model: expected module:function, as in nets:make_net, got {name!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
        try:
            with torch.device("meta"):
                network = factory()
        except NotImplementedError:  # something in it needs numbers
            network = factory()
    except Exception as error:
        raise InputError(f"--model {name} cannot be made: {type(error).__name__}: {error}") from None
    finally:
        sys.path.pop(0)
    if not isinstance(network, torch.nn.Module):
        raise InputError(f"--model {name}: expected a torch.nn.Module, got {type(network).__name__}")
    shapes = [tuple(p.shape) for p in network.parameters() if p.requires_grad]
    if not any(p.numel() for p in network.parameters() if p.requires_grad):
        raise InputError(f"--model {name}: the network has no trainable weights")
    return shapes


# --- Measuring ----------------------------------------------------------------------------------------------


def _time_passes(
    shapes: list[Shape], rule: str, dtype: torch.dtype, device: torch.device, repeats: int
) -> list[tuple[str, int, float]]:
    import statistics

    import torch

    from ..profiling import steps
    from ..profiling.timing import interleaved

    passes = steps.sequential_passes(shapes, rule, dtype, device)
    with torch.no_grad():
        seconds = interleaved({str(i): run for i, (_, _, run) in enumerate(passes)}, repeats, device)
    return [(name, moved, statistics.median(seconds[str(i)])) for i, (name, moved, _) in enumerate(passes)]


def _write_trace(path: Path, shapes: list[Shape], rule: str, dtype: torch.dtype, device: torch.device) -> None:
    """One iteration. The slow weights are interpolated within the retain step, so their range lies in its range."""
    import contextlib

    import torch
    from torch.profiler import ProfilerActivity, record_function

    from ..profiling import steps
    from ..utils.files import atomic_path

    passes = steps.sequential_passes(shapes, rule, dtype, device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with torch.no_grad():
        for _, _, run in passes:
            run()
        with torch.profiler.profile(activities=activities) as profiler:
            for name, _, run in passes:
                inner = record_function("interpolate") if name == "retain_step" else contextlib.nullcontext()
                with record_function(name), inner:
                    run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    with atomic_path(path) as partial:
        profiler.export_chrome_trace(str(partial))


# --- Showing ------------------------------------------------------------------------------------------------


def _predict(measurement: Measurement, passes: list[tuple[str, int, float]]) -> list[dict[str, Any]]:
    """Each pass, and all of them by the optimizer, with the time that its bytes take at the speed of the triad."""
    fused = measurement.rows[0]
    return [
        {
            "pass": name,
            "bytes": moved,
            "measured_ms": 1e3 * seconds,
            "predicted_ms": moved / measurement.triad_gb_per_s / 1e6,
        }
        for name, moved, seconds in [*passes, ("all", fused["bytes"], fused["p50_ms"] / 1e3)]
    ]


def _show_passes(timed: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="Our passes over memory: measured, and predicted from the triad")
    for name, justify in (("pass", "left"), ("MB", "right"), ("measured ms", "right"), ("predicted ms", "right")):
        table.add_column(name, justify=justify)
    what = {"products": "norms, finite?", "forget_step": "forget step", "retain_step": "retain step, slow weights"}
    what["all"] = "all, by UnlearnOptimizer"
    for row in timed:
        cells = f"{row['bytes'] / 1e6:.1f}", f"{row['measured_ms']:.2f}", f"{row['predicted_ms']:.2f}"
        table.add_row(what[row["pass"]], *cells)
    console.print(table)


def _show_memory(sizes: dict[str, int], taken: int | None, console: Console) -> None:
    table = Table(title="Memory for the update")
    table.add_column("tensors")
    for name in ("measured MB", "predicted MB"):
        table.add_column(name, justify="right")
    for name, size in sizes.items():
        table.add_row(name, "", f"{size / 1e6:.1f}")
    peak = "not measured" if taken is None else f"{taken / 1e6:.1f}"
    table.add_row("peak, all at once", peak, f"{sum(sizes.values()) / 1e6:.1f}")
    console.print(table)
