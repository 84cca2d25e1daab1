"""One optimizer step as functions over lists: buckets, clipping, the operator's calls, and the end of a round."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter, is_
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from .. import ops
from ..distributed.shards import all_local, is_sharded, local, shard_groups, sum_over
from ..errors import InputError, NonFiniteError
from ..ops.clipping import as_scalar, clip_factor
from .config import as_betas, parameter_names
from .gradients import Gradients, state_dtype

__all__ = ["MOMENTS", "Bucket", "Function", "Record", "Step", "apart", "clip", "close_step", "first_non_finite"]
__all__ += ["make_slow_weights", "no_gradients", "raise_non_finite", "run_step", "step_bucket"]

MOMENTS: dict[str, tuple[str, ...]] = {"sgd": (), "momentum": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq")}
MOMENTS["adamw"] = MOMENTS["adam"]
_DEVICE = attrgetter("device")
Function = TypeVar("Function", bound=Callable[..., Any])


def apart(function: Function) -> Function:
    """Makes it the same in whatever mode the process is: it records no graph, and tensors that it makes in inference
    mode can be changed afterwards."""
    # In this order: leaving inference mode records graphs.
    return torch.inference_mode(mode=False)(torch.no_grad()(function))


class Record(Protocol):
    """What steps leave behind for those that follow and for whoever asks: attributes of the optimizer."""

    last_clip: Tensor | None
    last_projection: Tensor | None
    non_finite: Tensor | None  # a flag on the device: some step since it was read has met a gradient that is not finite
    broken: str | None
    in_parts: bool  # whether a step in the backward pass was made
    measured: dict[str, tuple[Any, Any]]  # side -> clip factor and skip flag of its next step in the backward pass


@dataclass
class Step:
    """What one step runs over and how; ``parameters``, ``forget``, ``retain`` and ``bits`` are aligned lists."""

    op: str
    groups: list[dict[str, Any]]
    parameters: list[Tensor]
    forget: Gradients
    retain: Gradients
    bits: list[Tensor] | None  # None where this step is not masked
    mask_scope: str
    protect: bool
    state: MutableMapping[Tensor, dict[str, Any]]
    rule: str
    prefix: str  # of the names of its moments and its counter
    limits: tuple[float | None, float | None]  # of the norms of the forget and the retain gradient
    project: bool
    closes_round: bool
    record: Record

    @cached_property
    def states(self) -> list[dict[str, Any]]:
        """Each parameter's state. Hashing a tensor is a call into Python, and the states mostly stand in order."""
        if len(self.state) == len(self.parameters) and all(map(is_, self.state, self.parameters)):
            return list(self.state.values())
        return [self.state[p] for p in self.parameters]


@dataclass
class Bucket:
    """Parameters that one operator call can take: same group, same gradients present, same step count, one device, and
    cut over the same ranks."""

    group: dict[str, Any]
    indices: list[int]
    has_forget: bool
    has_retain: bool
    count: int
    ranks: tuple[Any, ...]


def run_step(step: Step) -> None:
    """Makes the step: everything that the optimizer does to weights and state once its gradients are aligned."""
    step.record.measured.clear()  # the weights will be others
    buckets = _make_buckets(step)
    make_slow_weights(step)
    factors, skip = clip(step, buckets)
    for bucket in buckets:
        step_bucket(step, bucket, factors, skip)
    close_step(step, itertools.chain.from_iterable(bucket.indices for bucket in buckets), skip)


def no_gradients(op: str) -> InputError:
    return InputError(f"{op}: every gradient is None; call backward() on a loss of these parameters first")


def _make_buckets(step: Step) -> list[Bucket]:
    buckets: list[Bucket] = []
    parameters, counter = step.parameters, f"{step.prefix}step"
    cut = any(map(is_sharded, parameters))
    ranks: list[tuple[Any, ...]] = [shard_groups(p) for p in parameters] if cut else [()] * len(parameters)
    start = 0
    for group in step.groups:
        stop = start + len(group["params"])
        kinds: tuple[list[Any], ...] = (
            [gradient is not None for gradient in step.forget[start:stop]],
            [gradient is not None for gradient in step.retain[start:stop]],
            [state.get(counter, 0) + 1 for state in step.states[start:stop]],
            list(map(_DEVICE, parameters[start:stop])),
            ranks[start:stop],
        )
        members: dict[tuple[Any, ...], list[int]] = {}
        if start < stop and all(values.count(values[0]) == len(values) for values in kinds):
            members[tuple(values[0] for values in kinds)] = list(range(start, stop))
        else:
            for i, kind in enumerate(zip(*kinds, strict=True), start):
                members.setdefault(kind, []).append(i)
        start = stop
        for (has_forget, has_retain, count, _, cut_over), indices in members.items():
            if has_forget or has_retain:
                buckets.append(Bucket(group, indices, has_forget, has_retain, count, cut_over))
    if not buckets:
        raise no_gradients(step.op)
    return buckets


def _picked(gradients: Gradients, bucket: Bucket, present: bool) -> Sequence[Tensor]:
    return cast("list[Tensor]", [gradients[i] for i in bucket.indices]) if present else ()


def _picked_bits(step: Step, indices: list[int]) -> Sequence[Tensor]:
    bits = step.bits
    return () if bits is None else [bits[i] for i in indices]


# --- Clipping and gradients that are not finite -------------------------------------------------------------


def clip(step: Step, buckets: list[Bucket]) -> tuple[tuple[Any, Any], Any]:
    """The two clip factors and the flag that a gradient is not finite: numbers on the CPU, where nothing waits for
    them, else 0-d tensors on the parameters' device."""
    home = step.parameters[buckets[0].indices[0]].device
    on_cpu = home.type == "cpu"
    by_ranks: dict[tuple[Any, ...], list[Any]] = {}  # weighted forget, weighted retain, non-finite, product
    for bucket in buckets:
        squares = by_ranks.setdefault(bucket.ranks, [0.0, 0.0, 0.0, 0.0])
        products = ops.gradient_products(
            _picked(step.forget, bucket, bucket.has_forget),
            _picked(step.retain, bucket, bucket.has_retain),
            _picked_bits(step, bucket.indices),
            step.mask_scope,
        )
        of_forget, of_retain, of_both, non_finite = products.tolist() if on_cpu else products.to(home)
        forget_weight, retain_weight = bucket.group["forget_weight"], bucket.group["retain_weight"]
        squares[0] = squares[0] + of_forget * forget_weight**2
        squares[1] = squares[1] + of_retain * retain_weight**2
        squares[2] = squares[2] + non_finite
        squares[3] = squares[3] + of_both * (forget_weight * retain_weight)
    squares = [sum(parts) for parts in zip(*itertools.starmap(_over_ranks, by_ranks.items()), strict=True)]
    skip, record = squares[2] > 0, step.record
    if not on_cpu:
        record.non_finite = skip if record.non_finite is None else record.non_finite | skip
    elif skip:
        raise_non_finite(step)
    forget_factor, retain_factor = map(clip_factor, step.limits, squares)
    if step.op != "retain_step":
        record.last_clip = as_scalar(forget_factor)
    if step.project and step.op == "joint_step":
        share = forget_factor * _conflict(squares[3], squares[1])
        record.last_projection = as_scalar(share)
        retain_factor = retain_factor + share
    return (forget_factor, retain_factor), skip


def _conflict(product: Any, square: Any) -> Any:
    """max(0, -<G_f, G_r>) / ||G_r||², and 0 where G_r is."""
    if isinstance(square, Tensor):
        return torch.where(square > 0, (-product).clamp(min=0) / square, torch.zeros_like(square))
    return max(0.0, -product) / square if square > 0 else 0.0


def _over_ranks(groups: tuple[Any, ...], sums: list[Any]) -> list[Any]:
    """Sums over the weights of every rank, from this rank's; as they are where it holds all of them."""
    if not groups:
        return sums
    if isinstance(sums[2], Tensor):
        return list(sum_over(groups, torch.stack([as_scalar(s).to(sums[2].device) for s in sums])))
    total: list[Any] = sum_over(groups, torch.tensor(sums, dtype=torch.float64, device="cpu")).tolist()
    return total


def raise_non_finite(step: Step) -> None:
    """Raises NonFiniteError, which names the first gradient that is not finite."""
    where = "a gradient is not finite in the part of it that another rank holds"
    if (first := first_non_finite(step)) is not None:
        where = f"the {first[0]} gradient of {first[1]} is not finite"
    raise NonFiniteError(
        f"{step.op}: {where} and no weight was changed: lower the learning rate or forget_alpha, or set max_norm"
    )


def first_non_finite(step: Step) -> tuple[str, str] | None:
    """The side and the name of a gradient that is not finite where it counts."""
    parameters = all_local(step.parameters)
    for i, name in enumerate(parameter_names(step.groups)):
        for side, gradient in (("forget", step.forget[i]), ("retain", step.retain[i])):
            if gradient is None or torch.isfinite(gradient).all():
                continue
            if step.bits is not None and (side == "forget" or step.mask_scope == "all"):
                keep = ops.unpack_bits([step.bits[i]], [parameters[i]])[0]
                if torch.isfinite(torch.where(keep, gradient, 0)).all():
                    continue
            return side, name
    return None


# --- Moving the weights -------------------------------------------------------------------------------------


def step_bucket(step: Step, bucket: Bucket, factors: tuple[Any, Any], skip: Any) -> None:
    """Moves the weights of a bucket in one call of the operator, and counts their step."""
    group, indices, rule = bucket.group, bucket.indices, step.rule
    if rule == "momentum" and not group["momentum"]:
        rule = "sgd"  # as torch.optim.SGD, which leaves the buffers as they are; a schedule may come back to them
    parameters, all_states = step.parameters, step.states
    whole, states = [parameters[i] for i in indices], [all_states[i] for i in indices]
    moments = [all_local(_moments(whole, states, step.prefix + name)) for name in MOMENTS[rule]]
    weights = all_local(whole)
    interpolate = step.closes_round and group["slow_rate"] != 1.0
    ops.step_(
        weights,
        rule=rule,
        scalars=ops.scalars(
            lr=_forget_rate(group) if step.op == "forget_step" else group["lr"],
            forget_weight=group["forget_weight"],
            retain_weight=group["retain_weight"],
            forget_clip=factors[0],
            retain_clip=factors[1],
            weight_decay=group["weight_decay"],
            step=bucket.count,
            slow_rate=group["slow_rate"],
            skip=skip,
            device=weights[0].device,
            **_of_rule(group, rule),
        ),
        forget_grads=_picked(step.forget, bucket, bucket.has_forget),
        retain_grads=_picked(step.retain, bucket, bucket.has_retain),
        slow=all_local([state["slow"] for state in states]) if interpolate else (),
        first_moments=moments[0] if moments else (),
        second_moments=moments[1] if len(moments) > 1 else (),
        bits=_picked_bits(step, indices),
        mask_scope=step.mask_scope,
        protect=step.protect,
        rounding_seed=_next_rounding_seed(group),
    )
    counter = f"{step.prefix}step"
    for state in states:
        state[counter] = bucket.count


def close_step(step: Step, moved: Iterable[int], skip: Any) -> None:
    """Once for all parameters: the slow move of those without a gradient, and progress within the round."""
    if step.closes_round:
        # Weights without a gradient in this step may have been moved by others of the round.
        still = set(range(len(step.parameters))).difference(moved)
        _interpolate(step, [i for i in sorted(still) if "slow" in step.states[i]], skip)
    if step.op != "forget_step":
        for group in step.groups:
            group["retain_steps"] += 1


def _interpolate(step: Step, indices: list[int], skip: Any) -> None:
    group_of = {id(p): group for group in step.groups for p in group["params"]}
    for i in indices:
        p, slow = step.parameters[i], step.states[i]["slow"]
        group = group_of[id(p)]
        ops.step_(
            [local(p)],
            rule="sgd",
            scalars=ops.scalars(lr=0.0, slow_rate=group["slow_rate"], skip=skip, device=p.device),
            slow=[local(slow)],
            bits=_picked_bits(step, [i]) if step.protect else (),
            protect=step.protect,
            rounding_seed=_next_rounding_seed(group),
        )


def _moments(weights: list[Tensor], states: list[dict[str, Any]], name: str) -> list[Tensor]:
    try:
        return [state[name] for state in states]
    except KeyError:  # the first step of some
        pass
    for p, state in zip(weights, states, strict=True):
        if name not in state:
            state[name] = torch.zeros_like(p, dtype=state_dtype(p), memory_format=torch.preserve_format)
    return [state[name] for state in states]


def make_slow_weights(step: Step) -> None:
    """Slow weights start where the weights are before the first step of any kind."""
    start = 0
    for group in step.groups:
        if group["slow_rate"] != 1.0:
            for p, state in zip(group["params"], step.states[start:], strict=False):
                if "slow" not in state:
                    state["slow"] = p.detach().to(state_dtype(p), copy=True)
        start += len(group["params"])


def _forget_rate(group: dict[str, Any]) -> Any:
    if group["forget_lr"] is None:
        return group["lr"]
    # Set by torch's schedulers, which know of `lr` only; OneCycleLR begins far below the rate that it is given.
    start = group.get("max_lr", group.get("initial_lr"))
    return group["forget_lr"] * (group["lr"] / start if start else 1.0)


def _of_rule(group: dict[str, Any], rule: str) -> dict[str, Any]:
    """The scalars that this rule alone reads."""
    if rule == "sgd":
        return {}
    if rule == "momentum":
        return {"momentum": group["momentum"]}
    beta1, beta2 = as_betas(group["betas"])  # a schedule or a user may have put anything there
    return {"beta1": beta1, "beta2": beta2, "eps": group["eps"]}


def _next_rounding_seed(group: dict[str, Any]) -> int | None:
    if group["rounding_seed"] is not None:
        group["rounding_seed"] += 1
    seed: int | None = group["rounding_seed"]
    return seed
