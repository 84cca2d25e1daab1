"""Saves two lists of sums to argv[2], by the library argv[1] or, for "own", by the package's: of all dtypes, and of
fewer with a tensor of many blocks."""

import sys
from pathlib import Path

import torch

from unlearn_ext import ops
from unlearn_ext.native import loading

if sys.argv[1] != "own":
    loading._find_or_build = lambda: Path(sys.argv[1])


def sums(dtypes, largest):
    torch.manual_seed(1)
    results = []
    shapes = [(), (0,), (31,), (64, 65), (100003,), (7, 5, 3), (largest,)] + [(n,) for n in range(1, 90)]
    for forget_dtype in dtypes:
        f = [torch.randn(shape, dtype=torch.float64).to(forget_dtype) for shape in shapes]
        for retain_dtype in (torch.float32, torch.bfloat16):
            r = [torch.randn(shape, dtype=torch.float64).to(retain_dtype) for shape in shapes]
            bits = ops.pack_bits([torch.rand(shape) < 0.4 for shape in shapes])
            for scope in ("forget", "all"):
                results += [ops.gradient_products(f, r, bits, scope), ops.gradient_products(f, (), bits, scope)]
                results += [ops.gradient_products((), r, bits, scope)]
    return results


every = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
torch.save([sums(every, 50_000), sums((torch.float32,), 2_200_000)], sys.argv[2])
