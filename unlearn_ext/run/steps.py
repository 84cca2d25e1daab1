"""Backward passes and steps of a run, in mixed precision too."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..optim import UnlearnOptimizer
from ..utils.gradients import no_gradient
from .context import RunContext
from .passes import BatchLoss

__all__ = ["Steps"]


class Steps:
    """Gradients of losses, and the optimizer's steps on them."""

    def __init__(self, context: RunContext, optimizer: UnlearnOptimizer):
        self.context, self.optimizer = context, optimizer
        self.parameters = [p for _, p in optimizer.named_parameters()]
        # One for each side: the forget loss is alpha times larger, so that it starts at a scale as much smaller, and
        # where it overflows only its own scale shrinks.
        largest = max(1, math.ceil(context.method.strength(0)))
        scales = {"forget": 2.0 ** (16 - (largest - 1).bit_length()), "retain": 2.0**16}
        self.scalers = {
            side: torch.amp.GradScaler(context.device.type, init_scale=scale)
            for side, scale in (scales.items() if context.mixed_precision == "fp16" else ())
        }

    def backward(self, loss: Tensor, batch: BatchLoss, side: str) -> None:
        if self.context.device.type == "cpu" and not bool(torch.isfinite(batch.reduced)):
            mean = batch.mean.item()  # from which a method may make a term that is not finite
            what = f"term is {batch.reduced.item()}" if math.isfinite(mean) else f"loss is {mean}"
            raise NonFiniteError(
                f"the {side} {what} and the step was not made: check the data, lower lr or forget_alpha"
            )
        if not loss.requires_grad:
            raise no_gradient(side)
        side = "forget" if side == "forget" else "retain"  # of the steps
        own, optimizer = self.context.optimizer_in_backward, self.optimizer
        if own and (optimizer.max_norm if side == "forget" else optimizer.retain_max_norm) is not None:
            with optimizer.norm_in_backward(side):
                loss.backward(retain_graph=True)
        with optimizer.step_in_backward(side) if own else contextlib.nullcontext():
            (self.scalers[side].scale(loss) if self.scalers else loss).backward()
        if not own and all(p.grad is None for p in self.parameters):
            raise no_gradient(side)

    def step(self, side: str) -> bool:
        """A forget or retain step on ``.grad``, and whether it was made: a GradScaler leaves it out when a scaled
        gradient overflowed."""
        step = self.optimizer.forget_step if side == "forget" else self.optimizer.retain_step
        if self.context.optimizer_in_backward:
            made = True  # by the backward pass
        elif not self.scalers:
            step()
            made = True
        else:
            # All that a scaler asks of an optimizer; it hands on what step() returns, or None where it left it out.
            target = SimpleNamespace(param_groups=self.optimizer.param_groups, step=lambda: step() is None)
            made = self.scalers[side].step(target) is True
            self.scalers[side].update()
        self.clear()
        return made

    def clear(self) -> None:
        for p in self.parameters:
            p.grad = None
