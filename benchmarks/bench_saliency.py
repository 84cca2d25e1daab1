"""How fast are Fisher accumulation and the masks made of scores?

    python benchmarks/bench_saliency.py
    python benchmarks/bench_saliency.py --shapes sd-unet --json saliency.json --plot saliency.png

fisher: F += g² with float32 or bfloat16 gradients. ratio_bits: SFR-on's mask of two Fisher diagonals. top_bits: the
largest half of all scores, against SalUn's way, which sorts them twice.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for the modules beside, from any directory

from benchmarks import saliency, script
from unlearn_ext import ops


def works(arguments: argparse.Namespace) -> script.Works:
    device = torch.device(arguments.device)
    for name in arguments.shapes or ["dit-xl-2"]:
        shapes = script.cut_shapes(name, arguments)
        for operator in arguments.operator or ["fisher", "ratio_bits", "top_bits"]:
            if operator == "fisher":
                for dtype in arguments.dtype or ["float32", "bfloat16"]:
                    yield name, functools.partial(saliency.fisher, shapes, getattr(torch, dtype), device)
            elif operator == "ratio_bits":
                yield name, functools.partial(saliency.ratio, shapes, device)
            elif hasattr(ops, "top_bits"):
                yield name, functools.partial(saliency.top, shapes, device)


if __name__ == "__main__":
    parser = script.options(__doc__)
    parser.add_argument("--operator", nargs="+", choices=("fisher", "ratio_bits", "top_bits"), help="default: all")
    sys.exit(script.main(parser, works))
