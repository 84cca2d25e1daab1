"""What the scripts in benchmarks/ share: their options and how a run of several measurements ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rich.console import Console

from unlearn_ext.errors import InputError, UnlearnError
from unlearn_ext.profiling import shapes
from unlearn_ext.profiling.plot import check_plot, plot
from unlearn_ext.profiling.report import Measurement, document, measure, show, write
from unlearn_ext.profiling.timing import repeats_for
from unlearn_ext.profiling.work import IMPLEMENTATIONS, Work
from unlearn_ext.utils.device import device_name

__all__ = ["CPU_WEIGHTS", "main", "options", "positive"]

CPU_WEIGHTS = 40_000_000  # of a network that has more, unless --weights says otherwise; on a GPU all

# label, and the function that makes the work: made one after the other, so that memory holds one at a time
Works = Iterable[tuple[str, Callable[[], Work]]]


def options(description: str, weights: bool = True) -> argparse.ArgumentParser:
    """``weights``: whether the script makes up weights, whose shapes and number can be chosen."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if weights:
        known = ", ".join(shapes.SHAPES)
        parser.add_argument("--shapes", nargs="+", help=f"{known}; 300x1000; or a .safetensors file")
        parser.add_argument("--weights", type=positive, help="about how many, in whole tensors; 40 M on the CPU")
        parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), help="of weights")
    parser.add_argument("--threads", type=positive, help="PyTorch's own choice unless given")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--repeats", type=positive, help="as many as take some seconds, unless given")
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        help="which to time; all by default, torch.compile up to 128 tensors",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw speed-ups and a roofline")
    return parser


def positive(text: str) -> int:
    number = int(text.replace("_", ""))
    if number < 1:
        raise argparse.ArgumentTypeError("expected a count from 1")
    return number


def cut_shapes(name: str, arguments: argparse.Namespace) -> list[shapes.Shape]:
    weights = arguments.weights
    if weights is None and arguments.device == "cpu":
        weights = CPU_WEIGHTS
    return shapes.cut(shapes.named(name), weights)


def main(parser: argparse.ArgumentParser, works: Callable[[argparse.Namespace], Works]) -> int:
    """Measures, shows and writes. What the user can mend is one line on stderr."""
    arguments = parser.parse_args()
    errors = Console(stderr=True, highlight=False)
    try:
        if arguments.plot is not None:
            check_plot(arguments.plot)
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        if torch.device(arguments.device).type != "cpu" and not torch.cuda.is_available():
            raise InputError(f"--device {arguments.device}: this torch sees no GPU; use --device cpu")
        measurements: list[Measurement] = []
        for label, make in works(arguments):
            with errors.status(f"measuring {label}"):
                work = make()
                repeats = arguments.repeats or repeats_for(work.weights)
                measurements.append(measure(label, work, arguments.implementations, repeats))
            show(measurements[-1:])
            del work
        if arguments.json is not None:
            write(arguments.json, document(measurements, arguments.device))
        if arguments.plot is not None:
            plot(arguments.plot, measurements, device_name(arguments.device), torch.get_num_threads())
    except UnlearnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
