"""Norms and steps made in the backward pass, of gradients that are freed before the next layers' appear."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..errors import InputError, NonFiniteError
from ..ops.clipping import as_scalar, clip_factor
from ..utils.arguments import check_choice
from ..utils.grad_hooks import arriving, passing_twice
from ..utils.gradients import check_gradient, fits

if TYPE_CHECKING:
    from . import UnlearnOptimizer
    from .optimizer import _Bucket

__all__ = ["measuring", "stepping"]

_LIMITS = {"forget": "max_norm", "retain": "retain_max_norm"}


@contextlib.contextmanager
def measuring(optimizer: UnlearnOptimizer, side: str) -> Iterator[None]:
    """The norm for a step that clips; :meth:`UnlearnOptimizer.norm_in_backward`."""
    norm = _Norm(optimizer, side)
    with passing_twice(), arriving(norm.parameters, norm.name, norm.take):
        yield
    norm.finish()


@contextlib.contextmanager
def stepping(optimizer: UnlearnOptimizer, side: str) -> Iterator[None]:
    """One forget or retain step, made by the backward pass of the block; :meth:`UnlearnOptimizer.step_in_backward`."""
    step = _Step(optimizer, side)
    try:
        with arriving(step.parameters, step.name, step.take):
            yield
    except BaseException as error:
        if step.made:
            optimizer.broken = (
                f"{len(step.made)} of {len(step.parameters)} parameters have made a step that the others have not"
            )
        if step.made and isinstance(error, NonFiniteError) and (name := step.first_non_finite()) is not None:
            raise NonFiniteError(
                f"{side}_step: the gradient of {name} is not finite, and {optimizer.broken} (the last "
                f"was {step.name(step.made[-1])}): go on from a checkpoint, with a lower learning rate or forget_alpha"
            ) from None
        raise
    step.finish()


class _Pass:
    """What both passes know of a side, one parameter at a time, in whatever order gradients appear."""

    def __init__(self, optimizer: UnlearnOptimizer, side: str):
        check_choice("side", side, _LIMITS)
        optimizer.check_whole()
        self.optimizer, self.side, self.op = optimizer, side, f"{side}_step"
        self.limit = getattr(optimizer, _LIMITS[side])
        self.parameters = optimizer._parameters()
        self.masked = optimizer.mask_bits is not None and (side == "forget" or optimizer.mask_scope == "all")
        self.places = [(group, i) for group in optimizer.param_groups for i in range(len(group["params"]))]
        # As the optimizer's own methods take them: a list of each side, here with one gradient at a time.
        self.gradients: dict[str, list[Tensor | None]] = {s: [None] * len(self.parameters) for s in _LIMITS}

    def name(self, i: int) -> str:
        return self.optimizer._names()[i]

    def take(self, gradients: dict[int, Tensor]) -> None:
        for i, gradient in gradients.items():
            if not fits(gradient):
                check_gradient(self.op, self.name(i), gradient)
        own, found = self.gradients[self.side], list(gradients)
        aligned = self.optimizer._aligned(self.op, list(gradients.values()), [self.parameters[i] for i in found])
        for i, gradient in zip(found, aligned, strict=True):
            own[i] = gradient
        self.use(found)
        for i in found:
            own[i] = None

    def use(self, found: list[int]) -> None:
        raise NotImplementedError

    def check_any(self, found: Collection[int]) -> None:
        if not found:
            raise InputError(f"{self.op}: every gradient is None; call backward() on a loss of these parameters first")


class _Norm(_Pass):
    def __init__(self, optimizer: UnlearnOptimizer, side: str):
        super().__init__(optimizer, side)
        self.found: dict[int, Any] = {}  # the weighted square, and how many entries are not finite

    def use(self, found: list[int]) -> None:
        optimizer = self.optimizer
        for i in found:
            forget, retain = ([g[i]] if g[i] is not None else () for g in self.gradients.values())
            bits = [optimizer.mask_bits[i]] if self.masked else ()
            products = ops.gradient_products(forget, retain, bits, optimizer.mask_scope)
            if self.parameters[i].device.type == "cpu":
                products = products.tolist()
                if products[3]:
                    optimizer._raise_non_finite(self.op, self.parameters, *self.gradients.values(), self.masked)
            square = products[0 if forget else 1] * self.places[i][0][f"{self.side}_weight"] ** 2
            self.found[i] = square, products[3]

    def finish(self) -> None:
        """Summed in the parameters' order, not in that of their gradients."""
        self.check_any(self.found)
        squares, non_finite = zip(*(self.found[i] for i in sorted(self.found)), strict=True)
        self.optimizer.measured[self.side] = clip_factor(self.limit, sum(squares)), sum(non_finite) > 0


class _Step(_Pass):
    """What :meth:`UnlearnOptimizer._step` does."""

    def __init__(self, optimizer: UnlearnOptimizer, side: str):
        super().__init__(optimizer, side)
        self.clip, self.skip = optimizer.measured.pop(side, (None, False))
        if self.clip is None and self.limit is not None:
            raise InputError(
                f"step_in_backward: {_LIMITS[side]} clips by the norm of all gradients: measure it first, in a "
                "backward pass of its own within norm_in_backward"
            )
        optimizer.measured.clear()  # the weights will be others
        self.states = optimizer._states(self.parameters)
        optimizer._make_slow_weights(self.states)
        own_state = side == "forget" and optimizer.dual_state
        self.prefix = "forget_" if own_state else ""
        self.rule = optimizer.forget_rule if own_state else optimizer.rule
        closes = (optimizer.param_groups[0]["retain_steps"] + 1) % optimizer.slow_freq == 0
        self.interpolate = side == "retain" and closes
        # Noise by place, not by the order in which gradients appear.
        self.seeds = {id(group): group["rounding_seed"] for group in optimizer.param_groups}
        self.made: list[int] = []

    def first_non_finite(self) -> str | None:
        """A name among the gradients at which the step ended, or None where something else was not finite."""
        found = self.optimizer._first_non_finite(self.parameters, *self.gradients.values(), self.masked)
        return None if found is None else found[1]

    def use(self, found: list[int]) -> None:
        optimizer, both = self.optimizer, (*self.gradients.values(),)
        buckets = self._buckets(found)
        clips, skip = optimizer._clip(self.op, self.parameters, *both, buckets, self.masked)
        if self.limit is not None:  # that was of some gradients
            clips, skip = (self.clip, self.clip), self.skip
        else:
            self.skip = self.skip | skip
        for bucket in buckets:
            group = bucket.group
            if group["rounding_seed"] is not None:
                group["rounding_seed"] = self.seeds[id(group)] + self.places[bucket.indices[0]][1]
            optimizer._step_bucket(
                bucket, self.parameters, self.states, *both, self.rule, self.prefix, self.masked, clips, skip,
                self.interpolate, self.side == "forget",
            )  # fmt: skip
            optimizer.in_parts |= self.limit is None  # else none moves where one gradient is not finite
            self.made += bucket.indices

    def _buckets(self, found: list[int]) -> list[_Bucket]:
        """What a call may take together: of one group and count, and alone where the noise goes by place."""
        from .optimizer import _Bucket

        members: dict[tuple[Any, ...], list[int]] = {}
        for i in found:
            group = self.places[i][0]
            count = self.states[i].get(f"{self.prefix}step", 0) + 1
            alone = i if group["rounding_seed"] is not None else None
            members.setdefault((id(group), count, self.parameters[i].device, alone), []).append(i)
        return [
            _Bucket(self.places[some[0]][0], some, self.side == "forget", self.side == "retain", count, ())
            for (_, count, _, _), some in members.items()
        ]

    def finish(self) -> None:
        """Once for all parameters: what closes a step and a round."""
        optimizer = self.optimizer
        self.check_any(self.made)
        if self.side == "forget" and self.limit is not None:
            optimizer.last_clip = as_scalar(self.clip)
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
