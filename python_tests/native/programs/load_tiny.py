"""Build and load the library whose sources are in the directory argv[1], and say which backend that gave."""

import sys
from pathlib import Path

from unlearn_ext import _native

_native._find_csrc = lambda: Path(sys.argv[1])
print(_native.load())
