"""Weights, gradients and state of one network, made up: an update does not mind what the numbers mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .shapes import Shape

__all__ = ["BETAS", "DECAY", "EPS", "MAX_NORM", "MOMENTUM", "RATES", "SLOW_RATE", "Tensors"]

# The settings of every measurement. Steps are small enough that weights stay ordinary numbers for hundreds of them,
# and large enough that bfloat16 sees them.
RATES = {"sgd": 0.1, "momentum": 0.1, "adam": 1e-3, "adamw": 1e-3}
MOMENTUM, BETAS, EPS, DECAY = 0.9, (0.9, 0.999), 1e-8, 0.01
MAX_NORM, SLOW_RATE = 1.0, 0.5
_KEPT = 0.5  # of the weights, by the mask


class Tensors:
    """One network's tensors, which all ways of updating it share.

    Attributes:
        weights, slow, forget, retain, first, second: lists aligned with ``shapes``; moments as the rule has them.
        masks, bits: the same mask as bool tensors and as packed bits.
        steps: torch.optim's counts of steps, for rules that have them; ``count`` is ours.
    """

    def __init__(self, shapes: Sequence[Shape], rule: str, dtype: torch.dtype, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)

        def normal(scale: float) -> list[Tensor]:
            made = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
            return [t.mul_(scale).to(dtype) for t in made]

        def zeros() -> list[Tensor]:
            return [torch.zeros(shape, device=device) for shape in shapes]

        self.rule, self.dtype, self.device = rule, dtype, device
        self.weights, self.forget, self.retain = normal(0.02), normal(0.01), normal(0.01)
        self.masks = [torch.rand(shape, generator=generator, device=device) < _KEPT for shape in shapes]
        self.bits = ops.pack_bits(self.masks)
        self.slow = [w.float().clone() for w in self.weights]
        self.first = zeros() if rule != "sgd" else []
        self.second = zeros() if rule in ("adam", "adamw") else []
        # torch's fused optimizers read the count on the weights' device, the others on the host.
        self.steps = [torch.zeros(()) for _ in shapes] if self.second else []
        self.fused_steps = [torch.zeros((), device=device) for _ in shapes] if self.second else []
        self.count = 0

    @property
    def moments(self) -> list[list[Tensor]]:
        return [moment for moment in (self.first, self.second) if moment]

    @property
    def moved(self) -> list[Tensor]:
        """What an update is for."""
        return [*self.weights, *self.slow, *self.first, *self.second]

    @property
    def all(self) -> list[Tensor]:
        """What an update may write to; PyTorch's ways mask and clip the gradients in place."""
        return [*self.moved, *self.forget, *self.retain, *self.steps, *self.fused_steps]

    @property
    def triad(self) -> tuple[list[Tensor], list[Tensor]]:
        """Two float32 lists for the triad."""
        return self.slow, self.retain if self.dtype == torch.float32 else [g.float() for g in self.retain]

    def scalars(self, **values: Any) -> Tensor:
        return ops.scalars(
            lr=RATES[self.rule],
            momentum=MOMENTUM,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            weight_decay=DECAY,
            step=self.count,
            **values,
        )

    def optimizer(self, **options: Any) -> torch.optim.Optimizer:
        """torch's own, with this state."""
        options = {"lr": RATES[self.rule], "weight_decay": DECAY, **options}
        if self.rule in ("sgd", "momentum"):
            names = ("momentum_buffer",)
            momentum = MOMENTUM if self.rule == "momentum" else 0.0
            optimizer: torch.optim.Optimizer = torch.optim.SGD(self.weights, momentum=momentum, **options)
        else:
            names = ("exp_avg", "exp_avg_sq")
            kind = torch.optim.AdamW if self.rule == "adamw" else torch.optim.Adam
            optimizer = kind(self.weights, betas=BETAS, eps=EPS, **options)
        steps = self.fused_steps if options.get("fused") else self.steps
        for i, w in enumerate(self.weights):
            state: dict[str, Any] = {name: moment[i] for name, moment in zip(names, self.moments, strict=False)}
            optimizer.state[w] = {"step": steps[i], **state} if steps else state
        return optimizer

    def give(self, gradients: Sequence[Tensor]) -> None:
        """As backward() leaves them."""
        for w, g in zip(self.weights, gradients, strict=True):
            w.grad = g
