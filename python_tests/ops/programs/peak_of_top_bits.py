"""Pages that were never touched before cannot have come from anywhere but the call itself."""

import resource
import sys

import torch

from unlearn_ext import ops

values = [torch.randn(int(sys.argv[1])) for _ in range(4)]
ops.top_bits([torch.ones(40000)], 20000, score="magnitude")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.top_bits(values, 2 * int(sys.argv[1]), score="magnitude")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
