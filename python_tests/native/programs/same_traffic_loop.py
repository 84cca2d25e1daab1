"""The same-traffic loop: it writes where it should, what it should, and nothing else."""

import sys

import torch
from helpers.layouts import CONTIGUOUS, MISALIGNED, Arena

from unlearn_ext.profiling import loop

loop._schemas()
torch.ops.load_library(sys.argv[1])
kernels = torch.ops.unlearn_ext_bench
rng = torch.Generator().manual_seed(7)
SHAPES = [(0,), (8,), (7,), (33,), (1025,), (5, 50)]
LAYOUTS = [CONTIGUOUS, MISALIGNED] * 3
BITS = {2: torch.int16, 4: torch.int32}


def stream(arena, dtype):  # any bits at all, NaNs among them
    return arena.place_each([random(s, dtype.itemsize).view(dtype) for s in SHAPES], LAYOUTS)


def random(shape, width):
    limit = 2 ** (8 * width - 1)
    return torch.randint(-limit, limit, shape, generator=rng).to(BITS[width])


def words(arena):
    return [arena.place(random(((torch.Size(s).numel() + 31) // 32,), 4)) for s in SHAPES]


def stored(tensor):  # the bits as numbers from 0
    width = tensor.element_size()
    return tensor.contiguous().view(BITS[width]).long().flatten() & (2 ** (8 * width) - 1)


def check(first, gradients, updated, read, with_words, with_written, mask):
    arena = Arena()
    streams = [stream(arena, first if s == 0 else torch.float32) for s in range(updated)]
    sources = [stream(arena, gradients) for _ in range(read)]
    bits, written = words(arena) if with_words else [], words(arena) if with_written else []
    fixed = [t for s in sources for t in s] + bits
    before = [stored(t) for t in fixed]
    old = [[stored(t) for t in s] for s in streams]
    kernels.same_traffic_(
        [t for s in streams for t in s], [t for s in sources for t in s], bits, written, len(SHAPES), mask
    )
    arena.check()
    assert all(torch.equal(stored(t), b) for t, b in zip(fixed, before, strict=True))
    for t, shape in enumerate(SHAPES):
        n = torch.Size(shape).numel()
        octets = bits[t].view(torch.uint8).long().repeat_interleave(8)[:n] if bits else torch.zeros(n).long()
        for s in sources:
            octets = octets ^ stored(s[t])
        for s, was in zip(streams, old, strict=True):
            limit = 2 ** (8 * s[t].element_size()) - 1
            assert torch.equal(stored(s[t]), was[t] ^ (octets & mask & limit)), (shape, mask)
        if written:
            padded = torch.zeros(32 * ((n + 31) // 32)).long()
            padded[:n] = octets
            folded = torch.zeros(len(padded) // 8).long()
            for k in range(8):
                folded ^= padded[k::8]
            assert torch.equal(stored(written[t].view(torch.uint8).to(torch.int16)), folded & 255), shape


for first in (torch.float32, torch.bfloat16):
    for gradients in (torch.float32, torch.float16):
        for updated in range(5):
            for read in range(3):
                for with_words, with_written in ((True, False), (False, updated == 0)):
                    if updated + read:
                        for mask in (0, 2**32 - 1) if updated else (0,):
                            check(first, gradients, updated, read, with_words, with_written, mask)
SHAPES, LAYOUTS = SHAPES * 80, LAYOUTS * 80  # more than one launch takes
check(torch.bfloat16, torch.float32, 4, 2, True, False, 2**32 - 1)
arena = Arena()
a, c = ([torch.randn(s, generator=rng) for s in SHAPES] for _ in range(2))
a, b, c = (arena.place_each(values, LAYOUTS) for values in (a, a, c))
kernels.triad_(a, b, c, 0.0)
assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
kernels.triad_(a, b, c, 0.5)
assert all(torch.allclose(x, y + 0.5 * z, rtol=1e-6) for x, y, z in zip(a, b, c, strict=True))
arena.check()
print("finished")
