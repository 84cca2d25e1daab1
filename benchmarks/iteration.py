"""Whole iterations, forward and backward included: ours against the released loop with torch.optim.

fused is the loop that docs/guides/optimizer.md shows for UnlearnOptimizer. eager is the released one, tensor by tensor:
mask, clip, step, step, interpolation; torch_fused is the same with ``fused=True``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_ext import SaliencyMask, UnlearnOptimizer, ops
from unlearn_ext.methods.sfron import adaptive_shares
from unlearn_ext.profiling.loop import Pass
from unlearn_ext.profiling.tensors import BETAS, EPS, MAX_NORM, SLOW_RATE
from unlearn_ext.profiling.work import Run, Work

__all__ = ["fisher_batch", "iteration"]

# The second of two iterations runs through a network whose weights differ in the last bits, and every layer adds to
# that; a mask or a clip left out moves tensors by their whole way.
_TOLERANCE = 0.1
_ALPHA, _LAMBDA, _ADAPTIVE_EPS = 1.0, 0.5, 1e-8
_SETTINGS = {
    "momentum": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4},
    "adamw": {"lr": 1e-4, "betas": BETAS, "eps": EPS, "weight_decay": 0.01},
}


class _Bench:
    """A network, a forget and a retain batch, a mask."""

    def __init__(self, network: type, batch_size: int | None, device: torch.device, **arguments: Any):
        torch.manual_seed(0)
        self.model: nn.Module = network(**arguments).to(device)
        generator = torch.Generator().manual_seed(1)
        size = batch_size or network.batch_size
        self.forget, self.retain = ([t.to(device) for t in network.batch(size, generator)] for _ in range(2))
        self.named = list(self.model.named_parameters())
        self.parameters = [p for _, p in self.named]
        self.masks = [torch.rand(p.shape, generator=generator).to(device) < 0.5 for p in self.parameters]

    def forget_backward(self) -> None:
        losses = self.model.losses(*self.forget)
        (-_ALPHA * (adaptive_shares(losses, _LAMBDA, _ADAPTIVE_EPS) * losses).sum()).backward()

    def retain_backward(self) -> None:
        self.model.losses(*self.retain).mean().backward()

    def clear(self) -> None:
        for p in self.parameters:
            p.grad = None

    @property
    def state(self) -> list[Tensor]:
        return [*(p.detach() for p in self.parameters), *self.model.buffers()]

    def work(self, operator: str, rule: str, passes: list[Pass], make: dict, state: list[Tensor], reset) -> Work:
        plain = [p.detach() for p in self.parameters]
        triad = ([t.clone() for t in plain], plain)
        device = plain[0].device
        return Work(
            operator, rule, torch.float32, device, passes, make, state, lambda _: state, triad, reset, _TOLERANCE
        )


def iteration(network: type, rule: str, batch_size: int | None, device: torch.device, **arguments: Any) -> Work:
    """Forget: forward, backward, masked and clipped step. Retain: forward, backward, step, slow weights."""
    bench = _Bench(network, batch_size, device, **arguments)
    settings = _SETTINGS[rule]
    resets: list[Callable[[], None]] = []

    def fused() -> Run:
        mask = SaliencyMask.from_dict({n: m for (n, _), m in zip(bench.named, bench.masks, strict=True)})
        optimizer: list[UnlearnOptimizer] = []

        def reset() -> None:
            options = {"rule": rule, "max_norm": MAX_NORM, "slow_rate": SLOW_RATE, "mask": mask}
            optimizer[:] = [UnlearnOptimizer(bench.named, **options, **settings)]

        def run() -> None:
            with torch.enable_grad():
                bench.forget_backward()
            optimizer[0].forget_step()
            bench.clear()
            with torch.enable_grad():
                bench.retain_backward()
            optimizer[0].step()
            bench.clear()

        resets.append(reset)
        return run

    def plain(**options: bool) -> Run:
        kind = torch.optim.SGD if rule == "momentum" else torch.optim.AdamW
        optimizer: list[torch.optim.Optimizer] = []
        slow: list[Tensor] = []

        def reset() -> None:
            optimizer[:] = [kind(bench.parameters, **settings, **options)]
            slow[:] = [p.detach().clone() for p in bench.parameters]

        def run() -> None:
            with torch.enable_grad():
                bench.forget_backward()
            for p, mask in zip(bench.parameters, bench.masks, strict=True):
                p.grad.mul_(mask)
            torch.nn.utils.clip_grad_norm_(bench.parameters, MAX_NORM)
            optimizer[0].step()
            bench.clear()
            with torch.enable_grad():
                bench.retain_backward()
            optimizer[0].step()
            bench.clear()
            for p, s in zip(bench.parameters, slow, strict=True):
                s.lerp_(p, SLOW_RATE)
                p.copy_(s)

        resets.append(reset)
        return run

    def reset() -> None:
        for one in resets:
            one()

    moments = {"momentum": 1, "adamw": 2}[rule]
    weights = [p.detach() for p in bench.parameters]
    bits = ops.pack_bits(bench.masks)
    passes = [
        Pass(read=[weights], words_read=bits),
        Pass([weights, *(moments * [weights])], [weights], bits),
        Pass(read=[weights]),
        Pass([weights, weights, *(moments * [weights])], [weights]),
    ]
    make = {"fused": fused, "eager": plain, "torch_fused": lambda: plain(fused=True)}
    return bench.work("sequential", rule, passes, make, bench.state, reset)


def fisher_batch(network: type, batch_size: int | None, device: torch.device, **arguments: Any) -> Work:
    """One batch of the Fisher pass. eager is the released way, which keeps the sums on the host."""
    bench = _Bench(network, batch_size, device, **arguments)
    bench.model.eval()
    sums = [torch.zeros_like(p, requires_grad=False) for p in bench.parameters]

    def run(add: Callable[[list[Tensor]], None]) -> Run:
        def one() -> None:
            with torch.enable_grad():
                bench.retain_backward()
            add([p.grad for p in bench.parameters])
            bench.clear()

        return one

    def plain() -> Run:
        host = sums if device.type == "cpu" else [s.cpu() for s in sums]

        def add(gradients: list[Tensor]) -> None:
            for f, g in zip(host, gradients, strict=True):
                f += g.cpu() ** 2

        return run(add)

    passes = [Pass([sums], [sums])]
    make: dict[str, Callable[[], Run]] = {
        "fused": lambda: run(lambda gradients: ops.accumulate_fisher_(sums, gradients)),
        "eager": plain,
    }
    return bench.work("fisher", "", passes, make, sums, lambda: None)
