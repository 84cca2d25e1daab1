"""Runs an operator twice and prints which backend and library it took, and the file of the package that did it.

With the argument ``build`` also where its C++ sources are, and the processor seconds that building them took.
"""

import resource
import sys

import torch

import unlearn_ext
from unlearn_ext import ops
from unlearn_ext.native import loading, recipes

words = [torch.tensor([7], dtype=torch.int32)]
assert int(ops.count_bits(words)) == int(ops.count_bits(words)) == 3
print(loading.backend(), loading.library_path(), unlearn_ext.__file__, sep="\n")
if "build" in sys.argv:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(recipes.cpu_recipe().csrc, used.ru_utime + used.ru_stime, sep="\n")
