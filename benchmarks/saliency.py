"""The work of saliency: adding a gradient to a Fisher diagonal, and the masks made of scores.

PyTorch's ways make bool masks, 8 times what packed bits take; what they mark is compared bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unlearn_ext import ops
from unlearn_ext.profiling.loop import Pass, loop
from unlearn_ext.profiling.shapes import Shape, count
from unlearn_ext.profiling.work import Run, Work

__all__ = ["fisher", "ratio", "top"]

_GAMMA, _EPS = 1.0, 1e-15


def _squares(shapes: Sequence[Shape], device: torch.device, seed: int) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=device).mul_(0.01).square_() for shape in shapes]


def fisher(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> Work:
    """F += g², F in float32 whatever the gradient is."""
    total = _squares(shapes, device, 0)
    generator = torch.Generator(device).manual_seed(1)
    made = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    gradients = [t.mul_(0.01).to(dtype) for t in made]

    def eager() -> None:
        for f, g in zip(total, gradients, strict=True):
            f += g.float() ** 2

    def compiled() -> Run:
        def add(total, gradients):
            for f, g in zip(total, gradients, strict=True):
                f.add_(g.float().square())

        step = torch.compile(add, fullgraph=True, dynamic=False)
        return lambda: step(total, gradients)

    passes = [Pass([total], [gradients])]
    make: dict[str, Callable[[], Run]] = {
        "fused": lambda: lambda: ops.accumulate_fisher_(total, gradients),
        "loop": lambda: loop(passes),
        "eager": lambda: eager,
        "torch_compile": compiled,
    }
    if dtype == torch.float32:
        make["foreach"] = lambda: lambda: torch._foreach_addcmul_(total, gradients, gradients)
    other = gradients if dtype == torch.float32 else [g.float() for g in gradients]
    return Work("fisher", "", dtype, device, passes, make, total, lambda _: total, (total, other))


def ratio(shapes: Sequence[Shape], device: torch.device) -> Work:
    """Which weights have (F_f + eps) / (F_r + eps) ≥ gamma, and how many in each tensor."""
    forget, retain = _squares(shapes, device, 0), _squares(shapes, device, 1)
    bits, _ = ops.ratio_bits(forget, retain)

    def eager() -> list[Tensor]:
        masks = [(f + _EPS) / (r + _EPS) >= _GAMMA for f, r in zip(forget, retain, strict=True)]
        return [*masks, *(mask.sum() for mask in masks)]

    def foreach() -> list[Tensor]:
        quotients = torch._foreach_add(forget, _EPS)
        torch._foreach_div_(quotients, torch._foreach_add(retain, _EPS))
        masks = [q >= _GAMMA for q in quotients]
        return [*masks, *(mask.sum() for mask in masks)]

    def fused() -> tuple[list[Tensor], Tensor]:
        return ops.ratio_bits(forget, retain, gamma=_GAMMA, eps=_EPS)

    def result(returned: Any) -> list[Tensor]:
        if isinstance(returned, tuple):
            words, counts = returned
            return [*ops.unpack_bits(words, forget), *counts]
        return returned or []

    passes = [Pass(read=[forget, retain], words_written=bits)]
    make: dict[str, Callable[[], Run]] = {
        "fused": lambda: fused,
        "loop": lambda: loop(passes),
        "eager": lambda: eager,
        "foreach": lambda: foreach,
        "torch_compile": lambda: torch.compile(eager, fullgraph=True, dynamic=False),
    }
    return Work("ratio_bits", "", torch.float32, device, passes, make, [], result, (forget, retain))


def top(shapes: Sequence[Shape], device: torch.device) -> Work:
    """Exactly the largest half of all scores. eager is SalUn's way: one vector of all scores, and two argsorts."""
    scores = _squares(shapes, device, 0)
    total = count(shapes)
    k = total // 2

    def eager() -> list[Tensor]:
        flat = torch.cat([s.flatten() for s in scores])
        ranks = torch.argsort(torch.argsort(flat, descending=True, stable=True))  # stable, to choose among ties as ours
        parts = (ranks < k).split([s.numel() for s in scores])
        return [part.view_as(s) for part, s in zip(parts, scores, strict=True)]

    def result(returned: Any) -> list[Tensor]:
        if returned and isinstance(returned, tuple):
            returned = returned[0]
        if returned and returned[0].dtype == torch.int32:
            return ops.unpack_bits(returned, scores)
        return returned or []

    passes = [Pass(read=[scores], words_written=ops.pack_bits([s > 0 for s in scores]))]
    make: dict[str, Callable[[], Run]] = {
        "fused": lambda: lambda: ops.top_bits(scores, k),
        "loop": lambda: loop(passes),
        "eager": lambda: eager,
    }
    return Work("top_bits", "", torch.float32, device, passes, make, [], result, (scores, scores))
