"""How many seconds ``import unlearn_ext`` takes after torch's, and which of the packages in argv it imports."""

import sys
import time

import torch  # noqa: F401

before = set(sys.modules)
began = time.perf_counter()
import unlearn_ext  # noqa: E402, F401

print(time.perf_counter() - began)
print(sorted((set(sys.modules) - before) & set(sys.argv[1:])))
