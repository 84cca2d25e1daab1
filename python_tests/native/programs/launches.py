"""How many kernels each operator launches for a list of so many tensors: a line for each number after the library."""

import ctypes
import sys
from pathlib import Path

import torch

from unlearn_ext import ops
from unlearn_ext.native import loading

loading._find_or_build = lambda: Path(sys.argv[1])
ops.backend()
count = ctypes.CDLL(sys.argv[1]).cuda_on_host_launches


def launches(function, *args, **options):
    before = count()
    function(*args, **options)
    return count() - before


def of_each_operator(n):
    def tensors(dtype=torch.float32):
        return [torch.rand(40, dtype=dtype) for _ in range(n)]

    bits = ops.pack_bits([torch.rand(40) < 0.5 for _ in range(n)])
    moments = {"first_moments": tensors(), "second_moments": tensors()}
    adamw = {"rule": "adamw", "scalars": ops.scalars(lr=0.1), **moments}
    sgd = {"rule": "sgd", "scalars": ops.scalars(lr=0.1)}
    both = {"forget_grads": tensors(), "retain_grads": tensors()}
    return (
        launches(ops.step_, tensors(), forget_grads=tensors(), bits=bits, **adamw),
        launches(ops.step_, tensors(), retain_grads=tensors(), slow=tensors(), **adamw),
        launches(ops.step_, tensors(), **both, slow=tensors(), bits=bits, **sgd),
        launches(ops.step_, tensors(), **both, slow=tensors(), bits=bits, **adamw),
        launches(ops.accumulate_fisher_, tensors(), tensors(torch.bfloat16)),
        launches(ops.ratio_bits, tensors(), tensors()),
        launches(ops.gradient_products, tensors(), tensors(), bits),
    )


for length in sys.argv[2:]:
    print(*of_each_operator(int(length)))
