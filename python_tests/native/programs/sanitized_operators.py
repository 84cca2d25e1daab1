"""argv: the library, then the operators to call; the library of a control has one operator only."""

import sys
from pathlib import Path

import torch

from unlearn_ext import ops
from unlearn_ext.native import loading

loading._find_or_build = lambda: Path(sys.argv[1])
torch.set_num_threads(2)
rng = torch.Generator().manual_seed(3)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((), (0,), (1,), (31,), (32,), (33,), (255,), (257,), (3, 0, 2), (5, 7), (2, 3, 5, 7))
MANY = (16417,)  # more than a block


def plain(values):
    return values.clone(memory_format=torch.contiguous_format)


def misaligned(values):
    return torch.empty(values.numel() + 1, dtype=values.dtype)[1:].view(values.shape).copy_(values)


def backwards(values):
    order = tuple(reversed(range(values.dim())))
    return values.permute(order).clone(memory_format=torch.contiguous_format).permute(order)


def gaps(values):
    strides = [3 * stride for stride in plain(values).stride()]
    span = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True)) if values.numel() else 0
    return torch.empty(span, dtype=values.dtype).as_strided(values.shape, strides).copy_(values)


LAYOUTS = (plain, misaligned, backwards, gaps)


def in_layouts(make, layouts=LAYOUTS):
    return [layout(make(shape)) for shape in SHAPES for layout in layouts] + [layouts[1](make(MANY))]


def numbers(dtype, *layouts):
    return in_layouts(lambda shape: torch.randn(shape, generator=rng).to(dtype), layouts or LAYOUTS)


def flags():
    return in_layouts(lambda shape: torch.rand(shape, generator=rng) < 0.5)


def like(tensors, dtype):
    return [torch.rand(t.shape, generator=rng, dtype=dtype) for t in tensors]


def refuse(function, *args, **options):
    try:
        function(*args, **options)
    except RuntimeError:
        return
    raise AssertionError("an error was expected")


def step_():
    for dtype in DTYPES:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for rule in ops.RULES:
            for parts in ("forget", "retain", "both", "neither"):
                for slow in (True,) if parts == "neither" else (True, False):
                    for bits, scope, protect, seed in (((), "forget", False, 5), (WORDS, "all", True, None)):
                        weights = numbers(dtype)
                        ops.step_(
                            weights,
                            rule=rule,
                            scalars=ops.scalars(lr=0.1, momentum=0.9, weight_decay=0.1, slow_rate=0.5),
                            forget_grads=numbers(torch.bfloat16) if parts in ("forget", "both") else (),
                            retain_grads=numbers(dtype, *LAYOUTS[::-1]) if parts in ("retain", "both") else (),
                            slow=like(weights, wide) if slow else (),
                            first_moments=like(weights, wide) if rule != "sgd" else (),
                            second_moments=like(weights, wide) if rule in ("adam", "adamw") else (),
                            bits=bits,
                            mask_scope=scope,
                            protect=protect,
                            rounding_seed=seed,
                        )
    two = [torch.ones(3), torch.ones(4)]
    refuse(ops.step_, two, rule="sgd", scalars=ops.scalars(lr=1.0), retain_grads=two[::-1])
    refuse(ops.step_, [two[0].expand(9, 3)], rule="sgd", scalars=ops.scalars(lr=1.0), retain_grads=[torch.ones(9, 3)])


def gradient_products():
    for dtype in DTYPES:
        for scope in ("forget", "all"):
            for bits in ((), WORDS):
                ops.gradient_products(numbers(dtype), numbers(torch.float16, *LAYOUTS[::-1]), bits, scope)
                ops.gradient_products(numbers(dtype), (), bits, scope)
                ops.gradient_products((), numbers(dtype), bits, scope)


def fisher_double(wide=torch.float64):
    refuse(ops.accumulate_fisher_, [torch.ones(3)], [torch.ones(4)])
    for dtype in DTYPES:
        ops.accumulate_fisher_(numbers(wide), numbers(dtype, *LAYOUTS[::-1]), 0.5)


def fisher_float():
    fisher_double(torch.float32)


def ratio_bits():
    for wide in (torch.float64, torch.float32):
        ops.ratio_bits([f.square() for f in numbers(wide)], numbers(wide, *LAYOUTS[::-1]), gamma=2.0)


def top_bits():
    for wide in DTYPES:
        for score in ops.SCORES:
            other = numbers(torch.float32, *LAYOUTS[::-1]) if score in ("product", "ratio") else ()
            scores = numbers(wide)
            total = sum(s.numel() for s in scores)
            for k in (0, 1, total // 2, total):
                bits, counts = ops.top_bits(scores, k, other=other, score=score)
                assert counts.sum() == k == ops.count_bits(bits).sum()
    ops.top_bits(numbers(torch.float32) + numbers(torch.float64), 5000)
    ops.top_bits([torch.zeros(100001)], 50000)
    refuse(ops.top_bits, [torch.ones(3)], 4)


def pack_bits():
    masks = flags()
    words = ops.pack_bits(masks)
    assert all(torch.equal(a, b) for a, b in zip(ops.unpack_bits(words, numbers(torch.float32)), masks, strict=True))
    assert ops.count_bits(words).tolist() == [int(mask.sum()) for mask in masks]


def many():
    def odd(dtype=torch.float32):
        return [torch.rand(n % 67, generator=rng, dtype=torch.float64).to(dtype) for n in range(700)]

    words = ops.pack_bits([values < 0.5 for values in odd()])
    ops.step_(
        odd(),
        rule="adamw",
        scalars=ops.scalars(lr=0.1, slow_rate=0.5),
        forget_grads=odd(torch.bfloat16),
        retain_grads=odd(),
        slow=odd(),
        first_moments=odd(),
        second_moments=odd(),
        bits=words,
        protect=True,
    )
    ops.gradient_products(odd(), odd(torch.float16), words)
    ops.accumulate_fisher_(odd(), odd(torch.float16))
    words, _ = ops.ratio_bits(odd(), odd())
    ops.count_bits(words)
    ops.unpack_bits(words, odd())


def update():
    for dtype in DTYPES:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for parts in ("forget", "retain", "both", "neither"):
            for slow in (True,) if parts == "neither" else (True, False):
                for bits, scope in (((), "forget"), (WORDS, "all")):
                    operands = {"weights": numbers(dtype)}
                    if parts in ("forget", "both"):
                        operands["forget_grads"] = numbers(torch.bfloat16)
                    if parts in ("retain", "both"):
                        operands["retain_grads"] = numbers(torch.float16, *LAYOUTS[::-1])
                    if slow:
                        operands["slow"] = like(operands["weights"], wide)
                    followed = [tensor.requires_grad_() for tensors in operands.values() for tensor in tensors]
                    lr = torch.tensor(0.1, requires_grad=bool(bits))
                    results = ops.update(**operands, lr=lr, bits=bits, mask_scope=scope, slow_rate=0.5)
                    output_grads = [torch.rand_like(result) for result in results]
                    torch.autograd.grad(results, [*followed, lr] if bits else followed, output_grads)


if "pack_bits" in sys.argv:
    WORDS = ops.pack_bits(flags())
for name in sys.argv[2:]:
    globals()[name]()
print("finished", loading.backend())
