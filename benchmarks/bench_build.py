"""How long does a newcomer wait? A clean JIT build, a load from the cache, and what importing costs.

python benchmarks/bench_build.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

USE = "import torch; from unlearn_ext import ops; ops.count_bits([torch.ones(1, dtype=torch.int32)])"


def seconds(code: str, **environment: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, check=True)
    return time.perf_counter() - started


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        clean = seconds(USE, UNLEARN_EXT_CACHE=cache)
        cached = [seconds(USE, UNLEARN_EXT_CACHE=cache) for _ in range(5)]
        torch_only, own = [], []
        for _ in range(9):  # interleaved: the machine's mood hits both alike
            torch_only.append(seconds("import torch"))
            own.append(seconds("import torch, unlearn_ext"))
    print(f"first use, clean build     {clean:6.2f} s")
    print(f"later use, from the cache  {statistics.median(cached):6.2f} s")
    print(f"import torch               {statistics.median(torch_only):6.2f} s")
    print(f"import unlearn_ext over it {statistics.median(own) - statistics.median(torch_only):6.2f} s")


if __name__ == "__main__":
    main()
