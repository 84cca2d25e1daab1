"""How much faster is a whole SFR-on iteration, forward and backward included, than the released loop?

    python benchmarks/bench_iteration.py
    python benchmarks/bench_iteration.py --network dit --json iteration.json

sequential: one forget and one retain batch, both steps and the slow weights. fisher: one batch of the Fisher pass.
Networks: ResNet-18 (11.2 M weights, momentum, batches of 32) and a small diffusion transformer (18.9 M weights, AdamW,
batches of 1 as released for DiT). The larger the batch, the less an update matters: --batch-size says.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for the modules beside, from any directory

from benchmarks import iteration, script
from benchmarks.networks import NETWORKS

RULES = {"resnet18": "momentum", "dit": "adamw"}


def works(arguments: argparse.Namespace) -> script.Works:
    device = torch.device(arguments.device)
    for name in arguments.network or NETWORKS:
        network, size = NETWORKS[name], arguments.batch_size
        narrow = {"width": arguments.width} if arguments.width else {}
        label = f"{name}, batches of {size or network.batch_size}"
        yield label, functools.partial(iteration.iteration, network, RULES[name], size, device, **narrow)
        yield label, functools.partial(iteration.fisher_batch, network, size, device, **narrow)


if __name__ == "__main__":
    parser = script.options(__doc__, weights=False)
    parser.add_argument("--network", nargs="+", choices=tuple(NETWORKS), help="default: all")
    parser.add_argument("--batch-size", type=int, help="default: 32 for resnet18, 1 for dit")
    parser.add_argument("--width", type=int, help="channels of the first stage, or of the tokens")
    sys.exit(script.main(parser, works))
