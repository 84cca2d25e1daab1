"""The options of benchmarks/bench_dit.py."""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.dit import network, report
from benchmarks.dit.measure import DTYPES, IMPLEMENTATIONS, STAGES, Settings, measure
from benchmarks.script import positive
from unlearn_ext.errors import InputError, UnlearnError
from unlearn_ext.profiling.report import write
from unlearn_ext.profiling.work import MismatchError

__all__ = ["main"]


def main(description: str) -> int:
    """Measures, shows and writes. What the user can mend is one line on stderr."""
    arguments = _parser(description).parse_args()
    errors = Console(stderr=True, highlight=False)
    warnings.filterwarnings("ignore", "There is a performance drop")  # attention has no batching rule on the CPU
    try:
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        if torch.device(arguments.device).type != "cpu" and not torch.cuda.is_available():
            raise InputError(f"--device {arguments.device}: this torch sees no GPU; use --device cpu")
        settings = _settings(arguments)
        with errors.status("building the network") as status:
            measured = measure(settings, lambda what: status.update(what))
        report.show(measured, arguments.network)
        if arguments.json is not None:
            write(arguments.json, report.document(measured, arguments.network))
    except (UnlearnError, MismatchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _settings(arguments: argparse.Namespace) -> Settings:
    shape = network.NETWORKS[arguments.network]
    shape = replace(shape, depth=arguments.depth or shape.depth, heads=arguments.heads or shape.heads)
    shape = replace(shape, width=arguments.width or shape.width)
    implementations = [name for name in IMPLEMENTATIONS if _word(name) in arguments.implementations]
    return Settings(
        shape=shape,
        layout=arguments.layout,
        dtype=arguments.dtype,
        device=torch.device(arguments.device),
        batch_size=arguments.batch_size,
        samples=arguments.samples,
        chunk=arguments.chunk,
        checkpointing=arguments.gradient_checkpointing,
        repeats=arguments.repeats,
        stages=arguments.stages,
        implementations=implementations,
    )


def _word(name: str) -> str:
    """An implementation's name as an option has it."""
    return name.replace(", ", "_").replace(" ", "_")


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="dit-s-2", choices=tuple(network.NETWORKS))
    layouts = "; ".join(f"{name}: {what}" for name, what in network.LAYOUTS.items())
    parser.add_argument("--layout", default="diffusers", choices=tuple(network.LAYOUTS), help=layouts)
    for option in ("depth", "width", "heads"):
        parser.add_argument(f"--{option}", type=positive, help="instead of the network's own, for a short trial")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    dtypes = "of weights; autocast: float32 weights under bfloat16 autocast"
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help=dtypes)
    parser.add_argument("--threads", type=positive, help="PyTorch's own choice unless given")
    parser.add_argument("--batch-size", type=positive, default=1, help="1, as released for DiT")
    parser.add_argument("--samples", type=positive, default=8, help="batches in a Fisher pass; 8")
    parser.add_argument("--chunk", type=positive, default=8, help="samples that the exact Fisher takes at once; 8")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in all implementations")
    parser.add_argument("--repeats", type=positive, default=9, help="9")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="all")
    words = [_word(name) for name in IMPLEMENTATIONS]
    parser.add_argument("--implementations", nargs="+", choices=words, default=words, help="all; ours always")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    return parser
