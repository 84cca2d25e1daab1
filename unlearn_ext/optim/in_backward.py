"""Norms and steps made in the backward pass, of gradients that are freed before the next layers' appear."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import InputError, NonFiniteError
from ..ops.clipping import as_scalar, clip_factor
from ..utils.grad_hooks import arriving, passing_twice
from ..utils.gradients import check_gradient, fits
from .config import parameter_names
from .gradients import align_gradients
from .step import (
    Bucket,
    Step,
    clip,
    close_step,
    first_non_finite,
    make_slow_weights,
    no_gradients,
    raise_non_finite,
    step_bucket,
)

__all__ = ["LIMITS", "measuring", "stepping"]

LIMITS = {"forget": "max_norm", "retain": "retain_max_norm"}  # side -> the optimizer's name of its limit


@contextlib.contextmanager
def measuring(step: Step, side: str) -> Iterator[None]:
    """The norm for a step that clips; :meth:`UnlearnOptimizer.norm_in_backward`."""
    norm = _NormPass(step, side)
    with passing_twice(), arriving(step.parameters, norm.name, norm.take):
        yield
    norm.finish()


@contextlib.contextmanager
def stepping(step: Step, side: str) -> Iterator[None]:
    """One forget or retain step, made by the backward pass of the block; :meth:`UnlearnOptimizer.step_in_backward`."""
    moving = _StepPass(step, side)
    try:
        with arriving(step.parameters, moving.name, moving.take):
            yield
    except BaseException as error:
        if not moving.moved:
            raise
        broken = f"{len(moving.moved)} of {len(step.parameters)} parameters have made a step that the others have not"
        step.record.broken = broken
        if isinstance(error, NonFiniteError) and (first := first_non_finite(step)) is not None:
            raise NonFiniteError(
                f"{step.op}: the gradient of {first[1]} is not finite, and {broken} (the last was "
                f"{moving.name(moving.moved[-1])}): go on from a checkpoint, with a lower learning rate or forget_alpha"
            ) from None
        raise
    moving.finish()


class _Pass:
    """What both passes know of a side. Gradients appear in any order, and stand in the step's lists while in use."""

    def __init__(self, step: Step, side: str):
        self.step, self.side = step, side
        self.gradients = step.forget if side == "forget" else step.retain
        self.limit = step.limits[list(LIMITS).index(side)]
        self.places = [(group, i) for group in step.groups for i in range(len(group["params"]))]

    def name(self, i: int) -> str:
        return parameter_names(self.step.groups)[i]

    def take(self, gradients: dict[int, Tensor]) -> None:
        op, indices = self.step.op, list(gradients)
        for i, gradient in gradients.items():
            if not fits(gradient):
                check_gradient(op, self.name(i), gradient)
        parameters = [self.step.parameters[i] for i in indices]
        aligned = align_gradients(op, list(gradients.values()), parameters, lambda at: self.name(indices[at]))
        for i, fitting in zip(indices, aligned, strict=True):
            self.gradients[i] = fitting
        self.use(indices)
        for i in indices:
            self.gradients[i] = None

    def use(self, indices: list[int]) -> None:
        raise NotImplementedError

    def check_any(self, indices: Collection[int]) -> None:
        if not indices:
            raise no_gradients(self.step.op)


class _NormPass(_Pass):
    def __init__(self, step: Step, side: str):
        super().__init__(step, side)
        self.squares: dict[int, tuple[Any, Any]] = {}  # the weighted square, and how many entries are not finite

    def use(self, indices: list[int]) -> None:
        step = self.step
        for i in indices:
            forget, retain = ([g] if (g := side[i]) is not None else [] for side in (step.forget, step.retain))
            bits = [] if step.bits is None else [step.bits[i]]
            products: Any = ops.gradient_products(forget, retain, bits, step.mask_scope)
            if step.parameters[i].device.type == "cpu":
                products = products.tolist()
                if products[3]:
                    raise_non_finite(step)
            square = products[0 if forget else 1] * self.places[i][0][f"{self.side}_weight"] ** 2
            self.squares[i] = square, products[3]

    def finish(self) -> None:
        """Summed in the parameters' order, not in that of their gradients."""
        self.check_any(self.squares)
        squares, non_finite = zip(*(self.squares[i] for i in sorted(self.squares)), strict=True)
        self.step.record.measured[self.side] = clip_factor(self.limit, sum(squares)), sum(non_finite) > 0


class _StepPass(_Pass):
    """What :func:`~unlearn_ext.optim.step.run_step` does, a few parameters at a time."""

    def __init__(self, step: Step, side: str):
        super().__init__(step, side)
        measured = step.record.measured
        self.factor, self.skip = measured.pop(side, (None, False))
        if self.factor is None and self.limit is not None:
            raise InputError(
                f"step_in_backward: {LIMITS[side]} clips by the norm of all gradients: measure it first, in a "
                "backward pass of its own within norm_in_backward"
            )
        measured.clear()  # the weights will be others
        make_slow_weights(step)
        # Noise by place, not by the order in which gradients appear.
        self.seeds = {id(group): group["rounding_seed"] for group in step.groups}
        self.moved: list[int] = []

    def use(self, indices: list[int]) -> None:
        buckets = self._buckets(indices)
        factors, skip = clip(self.step, buckets)
        if self.limit is not None:  # that was of some gradients
            factors, skip = (self.factor, self.factor), self.skip
        else:
            self.skip = self.skip | skip
        for bucket in buckets:
            group = bucket.group
            if group["rounding_seed"] is not None:
                group["rounding_seed"] = self.seeds[id(group)] + self.places[bucket.indices[0]][1]
            step_bucket(self.step, bucket, factors, skip)
            # Else none moves where one gradient is not finite.
            self.step.record.in_parts |= self.limit is None
            self.moved += bucket.indices

    def _buckets(self, indices: list[int]) -> list[Bucket]:
        """What a call may take together: of one group and count, and alone where the noise goes by place."""
        step = self.step
        members: dict[tuple[Any, ...], list[int]] = {}
        for i in indices:
            group = self.places[i][0]
            count = step.states[i].get(f"{step.prefix}step", 0) + 1
            alone = i if group["rounding_seed"] is not None else None
            members.setdefault((id(group), count, step.parameters[i].device, alone), []).append(i)
        return [
            Bucket(self.places[some[0]][0], some, self.side == "forget", self.side == "retain", count, ())
            for (_, count, _, _), some in members.items()
        ]

    def finish(self) -> None:
        """Once for all parameters: what closes a step and a round."""
        step = self.step
        self.check_any(self.moved)
        if self.side == "forget" and self.limit is not None:
            step.record.last_clip = as_scalar(self.factor)
        for group in step.groups:
            if group["rounding_seed"] is not None:
                group["rounding_seed"] = self.seeds[id(group)] + len(group["params"])
        with torch.no_grad():
            close_step(step, self.moved, self.skip)
