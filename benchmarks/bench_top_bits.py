"""How much faster is top_bits than the two argsorts over a concatenation that SalUn's released code makes?

    python benchmarks/bench_top_bits.py [weights]      # 20 million by default, half of them kept

Interleaved, medians. ratio_bits, which reads 8 bytes per weight once, says what the memory gives in the same run.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from unlearn_ext import ops

REPEATS = 5


def two_argsorts(gradients: list[Tensor], k: int) -> list[Tensor]:
    """Masks of the k largest magnitudes, as int64: the ranks of the magnitudes, cut at k."""
    ranks = torch.argsort(torch.argsort(-torch.cat([g.abs().flatten() for g in gradients])))
    parts = ranks.split([g.numel() for g in gradients])
    return [(part < k).long().view(g.shape) for part, g in zip(parts, gradients, strict=True)]


def main() -> None:
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000_000
    rng = torch.Generator().manual_seed(0)
    gradients, others = ([torch.randn(total // 10, generator=rng) for _ in range(10)] for _ in range(2))
    zeros = [torch.zeros_like(g) for g in gradients]
    k = total // 2
    runs: dict[str, Callable[[], object]] = {
        "two argsorts": lambda: two_argsorts(gradients, k),
        "top_bits, value": lambda: ops.top_bits(gradients, k),
        "top_bits, magnitude": lambda: ops.top_bits(gradients, k, score="magnitude"),
        "top_bits, product": lambda: ops.top_bits(gradients, k, other=others, score="product"),
        "top_bits, ratio": lambda: ops.top_bits(gradients, k, other=others, score="ratio"),
        "top_bits, all equal": lambda: ops.top_bits(zeros, k),
        "ratio_bits": lambda: ops.ratio_bits(gradients, others),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    runs["ratio_bits"]()  # builds the library
    for _ in range(REPEATS):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    slowest = statistics.median(seconds["two argsorts"])
    print(f"{total:,} float32 weights, {torch.get_num_threads()} threads, {REPEATS} runs")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:20} {1e3 * median:9.1f} ms ({1e3 * min(values):.1f} to {1e3 * max(values):.1f})", end="")
        print(f"  {slowest / median:6.1f} times faster" if name.startswith("top") else "")


if __name__ == "__main__":
    main()
