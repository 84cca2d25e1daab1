"""Gradients used in the backward pass: each as soon as it is whole, and freed before the next layers' appear."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import InputError, NonFiniteError

if TYPE_CHECKING:
    from .methods import Method
    from .optim import UnlearnOptimizer

__all__ = ["check_in_backward", "consuming", "stepping"]

_LIMITS = {"forget": "max_norm", "retain": "retain_max_norm"}


def check_in_backward(method: Method, mixed_precision: str, gradient_accumulation_steps: int) -> tuple[str, ...]:
    """The sides of a run whose steps can be made in the backward pass: those that no norm over all gradients clips.

    Raises:
        InputError: there is none, or the run's other settings need whole gradients.
    """
    for needed, why in (
        (method.update == "joint", "update='joint' needs the gradients of both sides at once"),
        (gradient_accumulation_steps > 1, "gradient_accumulation_steps above 1 adds up whole gradients before a step"),
        (mixed_precision == "fp16", "mixed_precision='fp16' looks at all gradients before a step; use bf16 or no"),
    ):
        if needed:
            raise InputError(f"optimizer_in_backward frees each gradient at once, and {why}: leave one of them out")
    sides = tuple(side for side, limit in _LIMITS.items() if getattr(method, limit) is None)
    if not sides:
        raise InputError(
            "optimizer_in_backward does nothing where max_norm and retain_max_norm clip both sides by the norm of all "
            "gradients: set one of them to None, or leave it out"
        )
    return sides


@contextlib.contextmanager
def consuming(
    parameters: Sequence[Tensor], name_of: Callable[[int], str], take: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Within the block ``take(i, gradient)`` gets parameter i's gradient once it is summed over all uses of the
    parameter, and ``.grad`` is freed.

    Raises:
        InputError: a gradient is there already, comes in parts, or is reduced over several processes afterwards.
    """
    if any(p.grad is not None for p in parameters):
        raise InputError("a step in the backward pass starts without gradients: call zero_grad() first")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        raise InputError(
            "several processes reduce their gradients after the hooks of the backward pass: leave "
            "optimizer_in_backward out"
        )
    taken: set[int] = set()

    def hook_of(i: int) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            if i in taken:
                raise InputError(
                    f"the gradient of {name_of(i)} came in parts and its first part has been used: call backward() "
                    "once, and checkpoint activations with use_reentrant=False"
                )
            taken.add(i)
            gradient, p.grad = p.grad, None
            with torch.no_grad():
                take(i, gradient)

        return hook

    handles = [p.register_post_accumulate_grad_hook(hook_of(i)) for i, p in enumerate(parameters) if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def stepping(optimizer: UnlearnOptimizer, side: str) -> Iterator[None]:
    """One forget or retain step, made by the backward pass of the block; :meth:`UnlearnOptimizer.step_in_backward`."""
    if side not in _LIMITS:
        raise InputError(f"step_in_backward: side: expected forget or retain, got {side!r}")
    if getattr(optimizer, _LIMITS[side]) is not None:
        raise InputError(
            f"step_in_backward: {_LIMITS[side]} clips by the norm of all gradients, which is not known before the last "
            f"of them: make an ordinary {side}_step, or set {_LIMITS[side]}=None"
        )
    step = _Step(optimizer, side)
    try:
        with consuming(step.parameters, step.name, step.take):
            yield
    except BaseException as error:
        if step.made:
            optimizer.broken = (
                f"{len(step.made)} of {len(step.parameters)} parameters have made a step that the others have not"
            )
        if step.made and isinstance(error, NonFiniteError):
            raise NonFiniteError(
                f"{side}_step: the gradient of {step.name(step.at)} is not finite, and {optimizer.broken} (the last "
                f"was {step.name(step.made[-1])}): go on from a checkpoint, with a lower learning rate or forget_alpha"
            ) from None
        raise
    step.finish()


class _Step:
    """What :meth:`UnlearnOptimizer._step` does, one parameter at a time, in whatever order gradients appear."""

    def __init__(self, optimizer: UnlearnOptimizer, side: str):
        optimizer.check_whole()
        self.optimizer, self.side, self.op = optimizer, side, f"{side}_step"
        self.parameters = optimizer._parameters()
        self.states = optimizer._states(self.parameters)
        optimizer._make_slow_weights(self.states)
        own_state = side == "forget" and optimizer.dual_state
        self.prefix = "forget_" if own_state else ""
        self.rule = optimizer.forget_rule if own_state else optimizer.rule
        self.masked = optimizer.mask_bits is not None and (side == "forget" or optimizer.mask_scope == "all")
        closes = (optimizer.param_groups[0]["retain_steps"] + 1) % optimizer.slow_freq == 0
        self.interpolate = side == "retain" and closes
        # Noise by place, not by the order in which gradients appear.
        self.places = [(group, i) for group in optimizer.param_groups for i in range(len(group["params"]))]
        self.seeds = {id(group): group["rounding_seed"] for group in optimizer.param_groups}
        # As the optimizer's own methods take them: a list of each side, here with one gradient at a time.
        self.gradients: dict[str, list[Tensor | None]] = {s: [None] * len(self.parameters) for s in _LIMITS}
        self.made: list[int] = []
        self.at = 0
        self.skip: bool | Tensor = False

    def name(self, i: int) -> str:
        return self.optimizer._names()[i]

    def take(self, i: int, gradient: Tensor) -> None:
        from .optim import _Bucket

        self.at = i
        optimizer, (group, place) = self.optimizer, self.places[i]
        if gradient.layout != torch.strided:
            raise InputError(f"{self.op}: the gradient of {self.name(i)} is sparse; make it dense with .to_dense()")
        own = self.gradients[self.side]
        (own[i],) = optimizer._aligned(self.op, [gradient], [self.parameters[i]])
        forget, retain = self.gradients["forget"], self.gradients["retain"]
        count = self.states[i].get(f"{self.prefix}step", 0) + 1
        bucket = _Bucket(group, [i], self.side == "forget", self.side == "retain", count)
        if group["rounding_seed"] is not None:
            group["rounding_seed"] = self.seeds[id(group)] + place
        try:
            clips, skip = optimizer._clip(self.op, self.parameters, forget, retain, [bucket], self.masked)
            optimizer._step_bucket(
                bucket, self.parameters, self.states, forget, retain, self.rule, self.prefix, self.masked, clips, skip,
                self.interpolate, self.side == "forget",
            )  # fmt: skip
        finally:
            own[i] = None
        self.skip = self.skip | skip
        optimizer.in_parts = True
        self.made.append(i)

    def finish(self) -> None:
        """Once for all parameters: what closes a step and a round."""
        optimizer = self.optimizer
        if not self.made:
            raise InputError(f"{self.op}: every gradient is None; call backward() on a loss of these parameters first")
        for group in optimizer.param_groups:
            if group["rounding_seed"] is not None:
                group["rounding_seed"] = self.seeds[id(group)] + len(group["params"])
        with torch.no_grad():
            if self.interpolate:
                left = set(range(len(self.parameters))).difference(self.made)
                left = [i for i in sorted(left) if "slow" in self.states[i]]
                optimizer._interpolate(left, self.parameters, self.masked, self.skip)
        if self.side == "retain":
            for group in optimizer.param_groups:
                group["retain_steps"] += 1
        optimizer._opt_called = True
