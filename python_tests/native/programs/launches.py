"""How many kernels each operator launches for a list of argv[2] tensors."""

import ctypes
import sys
from pathlib import Path

import torch

from unlearn_ext import _native, ops

_native._find_or_build = lambda: Path(sys.argv[1])
ops.backend()
count = ctypes.CDLL(sys.argv[1]).cuda_on_host_launches
n = int(sys.argv[2])


def tensors(dtype=torch.float32):
    return [torch.rand(40, dtype=dtype) for _ in range(n)]


def launches(function, *args, **options):
    before = count()
    function(*args, **options)
    return count() - before


bits = ops.pack_bits([torch.rand(40) < 0.5 for _ in range(n)])
adamw = {"rule": "adamw", "scalars": ops.scalars(lr=0.1)}
print(
    launches(
        ops.step_,
        tensors(),
        forget_grads=tensors(),
        bits=bits,
        first_moments=tensors(),
        second_moments=tensors(),
        **adamw,
    )
)
print(
    launches(
        ops.step_,
        tensors(),
        retain_grads=tensors(),
        slow=tensors(),
        first_moments=tensors(),
        second_moments=tensors(),
        **adamw,
    )
)
print(
    launches(
        ops.step_,
        tensors(),
        forget_grads=tensors(),
        retain_grads=tensors(),
        slow=tensors(),
        bits=bits,
        rule="sgd",
        scalars=ops.scalars(lr=0.1),
    )
)
print(
    launches(
        ops.step_,
        tensors(),
        forget_grads=tensors(),
        retain_grads=tensors(),
        slow=tensors(),
        bits=bits,
        first_moments=tensors(),
        second_moments=tensors(),
        **adamw,
    )
)
print(launches(ops.accumulate_fisher_, tensors(), tensors(torch.bfloat16)))
print(launches(ops.ratio_bits, tensors(), tensors()))
print(launches(ops.gradient_products, tensors(), tensors(), bits))
