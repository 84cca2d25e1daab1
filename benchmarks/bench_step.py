"""How fast is an unlearning step, against what the memory allows and against PyTorch's own ways?

    python benchmarks/bench_step.py                                   # 40 M weights of DiT-XL/2, and 300 small tensors
    python benchmarks/bench_step.py --shapes sd-unet --rule momentum --json step.json --plot step.png

joint: mask, both gradients, rule and slow weights in one call (rule sgd unless --rule says otherwise). sequential: the
weight work of one SFR-on iteration through UnlearnOptimizer (rule adamw): masked norm, clipped forget step, retain
step, slow weights. Every way is checked to compute the same before it is timed; unlearn_ext/profiling says how.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for the modules beside, from any directory

from benchmarks import script
from unlearn_ext import ops
from unlearn_ext.profiling import steps

RULES = {"joint": "sgd", "sequential": "adamw"}


def works(arguments: argparse.Namespace) -> script.Works:
    default = arguments.shapes is None
    for name in arguments.shapes or ["dit-xl-2", "300x1000"]:
        small = default and name == "300x1000"  # asks what a step of small tensors costs, in the way a user makes it
        for operator in arguments.operator or (["sequential"] if small else list(RULES)):
            rule = arguments.rule or RULES[operator]
            for dtype in arguments.dtype or (["float32"] if small else ["float32", "bfloat16"]):
                shapes, device = script.cut_shapes(name, arguments), torch.device(arguments.device)
                yield name, functools.partial(getattr(steps, operator), shapes, rule, getattr(torch, dtype), device)


if __name__ == "__main__":
    parser = script.options(__doc__)
    parser.add_argument("--operator", nargs="+", choices=tuple(RULES), help="default: both")
    parser.add_argument("--rule", choices=ops.RULES, help="default: sgd for joint, adamw for sequential")
    sys.exit(script.main(parser, works))
