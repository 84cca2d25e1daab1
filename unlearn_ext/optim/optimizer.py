"""UnlearnOptimizer: a torch.optim.Optimizer whose step is the fused unlearning update."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter, eq, is_
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..distributed.shards import all_local, is_sharded, local, part_like, shard_groups, sum_over
from ..errors import InputError, NonFiniteError
from ..ops.checks import check_writable
from ..ops.clipping import as_scalar, clip_factor
from ..saliency import SaliencyMask
from ..utils.arguments import as_number, check_choice, check_count, check_instance, check_number, describe
from ..utils.gradients import FLOATING, check_gradient, check_parameters, fits
from .groups import NOTES, PER_GROUP, as_betas, check_group, check_rates, loaded_group, python_number, read_by
from .in_backward import measuring, stepping

__all__ = ["StepConfig", "UnlearnOptimizer"]

_MOMENTS = {"sgd": (), "momentum": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq")}
_MOMENTS["adamw"] = _MOMENTS["adam"]
_COUNTS = ("step", "forget_step")  # of the steps that a weight's moments have seen
_DEVICE, _DTYPE, _LAYOUT = attrgetter("device"), attrgetter("dtype"), attrgetter("layout")
# Settings that must match when a state_dict is loaded.
_OF_THE_STATE = ("rule", "forget_rule", "dual_state", "mask_scope", "protect", "slow_freq")


@dataclass(kw_only=True)
class StepConfig:
    """The optimizer's arguments, once for the optimizer and for every method. :class:`UnlearnOptimizer` says more."""

    rule: str = "momentum"
    lr: float = 0.01
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_norm: float | None = None
    retain_max_norm: float | None = None
    forget_weight: float = 1.0
    retain_weight: float = 1.0
    slow_rate: float = 1.0
    slow_freq: int = 1
    mask_scope: str = "forget"
    protect: bool = False
    dual_state: bool = False
    forget_rule: str | None = None
    forget_lr: float | None = None
    stochastic_rounding: bool = False
    project: bool = False

    def __post_init__(self) -> None:
        for name, value in (("rule", self.rule), ("forget_rule", self.forget_rule or self.rule)):
            check_choice(name, value, ops.RULES)
        if self.forget_rule is not None and not self.dual_state:
            raise InputError("forget_rule needs a state of its own: set dual_state=True")
        check_choice("mask_scope", self.mask_scope, ops.MASK_SCOPES)
        check_count("slow_freq", self.slow_freq)
        for name in ("protect", "dual_state", "stochastic_rounding", "project"):
            if not isinstance(value := getattr(self, name), bool):
                raise InputError(f"{name}: expected True or False, got {describe(value)}")
        for name in ("max_norm", "retain_max_norm"):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, "more than 0, or None for no clipping", lambda x: x > 0.0)
        check_rates(self.rule, self.forget_rule or self.rule, **{name: getattr(self, name) for name in PER_GROUP})
        self.betas = as_betas(self.betas)

    def check_group(self, settings: dict[str, Any]) -> None:
        """Whether a parameter group may set this for itself, and to these values; InputError if not."""
        defaults = {name: getattr(self, name) for name in PER_GROUP}
        check_group(settings, defaults, self.rule, self.forget_rule or self.rule)

    def make_optimizer(self, params_or_named_params: Iterable[Any], mask: SaliencyMask | None) -> UnlearnOptimizer:
        arguments = {field.name: getattr(self, field.name) for field in fields(StepConfig)}
        # A method's may be of classes that say that nobody gave them, which a saved state would not hold.
        arguments |= {"rule": str(self.rule), "momentum": float(self.momentum)}
        return UnlearnOptimizer(list(params_or_named_params), mask=mask, **arguments)


@dataclass
class _Bucket:
    """Parameters that one operator call can take: same group, same gradients present, same step count, one device, and
    cut over the same ranks."""

    group: dict[str, Any]
    indices: list[int]
    has_forget: bool
    has_retain: bool
    count: int
    ranks: tuple[Any, ...]


def _apart(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step is the same in whatever mode the process is: it records no graph, and moments that it makes in inference
    mode can be changed afterwards."""
    return torch.inference_mode(mode=False)(torch.no_grad()(step))  # in this order: leaving that mode records graphs


def _hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Fires the step hooks of torch.optim, which wraps step() alone by itself."""
    return torch.optim.Optimizer.profile_hook_step(_apart(step))


class UnlearnOptimizer(torch.optim.Optimizer):
    r"""Forget and retain steps as one fused update each.

    Per weight, with g_f and g_r descent directions (g_f is the gradient of :math:`-\alpha L_f`)::

        g      = (keep ? forget_weight * clip_f * g_f : 0) + retain_weight * clip_r * g_r
        theta' = rule(theta, g)
        slow'  = slow + slow_rate * (theta' - slow);  theta' = slow'       every slow_freq-th retain or joint step
        clip_f = min(1, max_norm / (|| forget_weight * mask * g_f || + 1e-6)), clip_r likewise, without mask

    ``forget_step`` uses g_f alone, ``retain_step`` and ``step`` g_r alone, ``joint_step`` both at once. The norms run
    over all parameters. On the CPU a non-finite gradient raises before anything is written; elsewhere the step writes
    no weight and no moment, and :meth:`raise_if_non_finite` tells. The host, which does not wait to know, counts such
    a step all the same, in bias corrections and in the round.

    Args:
        params_or_named_params: what torch.optim takes; named parameters (``model.named_parameters()``) are required
            with a mask, and make errors readable.
        rule: ``sgd`` (without momentum), ``momentum``, ``adam`` or ``adamw``, as in torch.optim.
        lr, momentum, betas, eps, weight_decay: as in torch.optim; decay is decoupled for ``adamw`` only.
        max_norm: clip the masked, weighted forget gradient to this norm. None: no clipping.
        retain_max_norm: the same for the retain gradient.
        forget_weight, retain_weight: factors of the gradients.
        slow_rate: how far the slow weights move at the end of a round. 1 keeps no slow copy at all.
        slow_freq: retain or joint steps in a round.
        mask: which weights forget gradients may move. Frozen parameters may be missing from it.
        mask_scope: ``forget`` masks forget gradients, ``all`` every gradient.
        protect: in a masked step a weight outside the mask keeps its exact bits, moments and slow weight included.
        dual_state: forget steps have moments of their own (DualOptim, arXiv 2504.15827).
        forget_rule, forget_lr: rule and learning rate of forget steps; a scheduler scales both rates alike.
        stochastic_rounding: round bfloat16 weights stochastically, for training without a float32 copy.
        project: in joint steps, where the forget gradient G_f (masked, weighted and clipped) and the retain gradient
            G_r (weighted) conflict, <G_f, G_r> < 0, the forget gradient loses its part along the retain gradient:
            G_f - <G_f, G_r> / ||G_r||² G_r. The product comes with the norms, and the part is folded into the retain
            gradient's factor: no pass over memory is added (PCGrad, arXiv 2001.06782, of one gradient).

    Attributes:
        mask_bits: the mask as packed bits, aligned with the parameters, or None.
        last_clip: the last forget gradient's clip factor, a 0-d tensor.
        last_projection: with ``project``, the multiple of G_r that the last joint step added to the retain gradient, a
            0-d tensor; 0 where nothing conflicted.
        broken: what a step in the backward pass left undone when it met an error, or None; until a state is loaded
            the optimizer then makes no step.

    Source: SFR-on, arXiv 2409.19732.
    """

    def __init__(
        self,
        params_or_named_params: Iterable[Any],
        *,
        rule: str,
        lr: float,
        momentum: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        retain_max_norm: float | None = None,
        forget_weight: float = 1.0,
        retain_weight: float = 1.0,
        slow_rate: float = 1.0,
        slow_freq: int = 1,
        mask: SaliencyMask | None = None,
        mask_scope: str = "forget",
        protect: bool = False,
        dual_state: bool = False,
        forget_rule: str | None = None,
        forget_lr: float | None = None,
        stochastic_rounding: bool = False,
        project: bool = False,
    ):
        config = StepConfig(
            rule=rule,
            lr=lr,
            momentum=momentum,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            max_norm=max_norm,
            retain_max_norm=retain_max_norm,
            forget_weight=forget_weight,
            retain_weight=retain_weight,
            slow_rate=slow_rate,
            slow_freq=slow_freq,
            mask_scope=mask_scope,
            protect=protect,
            dual_state=dual_state,
            forget_rule=forget_rule,
            forget_lr=forget_lr,
            stochastic_rounding=stochastic_rounding,
            project=project,
        )
        if mask is not None:
            check_instance("mask", mask, SaliencyMask, "SaliencyMask.load(path)")
        elif protect:
            raise InputError("protect=True needs a mask that says what to protect")
        self.rule, self.forget_rule = rule, forget_rule or rule
        self.max_norm, self.retain_max_norm = python_number(max_norm), python_number(retain_max_norm)
        self.slow_freq, self.mask_scope, self.protect, self.dual_state = int(slow_freq), mask_scope, protect, dual_state
        self.project = project
        self.last_clip: Tensor | None = None
        self.last_projection: Tensor | None = None
        self._non_finite: Tensor | None = None
        self.broken: str | None = None
        self.in_parts = False  # whether a step in the backward pass was made
        self.measured: dict[str, Any] = {}  # side -> clip factor and skip flag of its next step in the backward pass
        self.mask_bits: list[Tensor] | None = None
        # Progress within the round and noise stand in the groups, so that state_dict carries them.
        defaults = {name: python_number(getattr(config, name)) for name in read_by(self.rule, self.forget_rule)}
        defaults |= {"retain_steps": 0, "rounding_seed": None}
        self._rounding_base = int(torch.randint(2**31, (1,), device="cpu")) if stochastic_rounding else None
        self._complete = False  # until all groups have joined
        super().__init__(params_or_named_params, defaults)
        self._check_parameters()
        self._complete = True
        if mask is not None:
            if not all("param_names" in group for group in self.param_groups):
                raise InputError("a mask finds its weights by name: pass model.named_parameters(), not parameters()")
            self.mask_bits = mask.bind(self.named_parameters())

    # --- The parameters as one list -------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if getattr(self, "mask_bits", None) is not None:
            raise InputError("a parameter group cannot join after a mask is bound: build the optimizer with all groups")
        if isinstance(param_group, dict):  # else torch says what it expects
            unread = {name: getattr(StepConfig, name) for name in PER_GROUP if name not in self.defaults}
            settings = {key: value for key, value in param_group.items() if key not in NOTES}
            check_group(settings, {**unread, **self.defaults}, self.rule, self.forget_rule)
            for name in set(PER_GROUP).intersection(param_group):
                param_group[name] = as_betas(param_group[name]) if name == "betas" else python_number(param_group[name])
            if self._rounding_base is not None:  # noise of its own for each group
                param_group["rounding_seed"] = self._rounding_base + (len(self.param_groups) << 32)
            if self.param_groups:  # a group that comes later joins the round under way
                param_group["retain_steps"] = self.param_groups[0]["retain_steps"]
        super().add_param_group(param_group)
        if self._complete:
            try:
                self._check_parameters()
            except InputError:
                self.param_groups.pop()
                raise

    def _check_parameters(self) -> None:
        """Once for all groups: a step takes the parameters in several calls, and would move twice what two share."""
        check_parameters(self.named_parameters())
        placed = [p for p in all_local(self._parameters()) if not p.is_meta]
        try:
            check_writable("UnlearnOptimizer", parameters=placed)
        except RuntimeError as error:
            raise InputError(f"{error}: clone() one, or make both the same Parameter") from None

    def __getstate__(self) -> dict[str, Any]:
        # torch's own keeps three attributes, and a copy could not step. Hooks and a scheduler's patched step stay
        # behind, as they do there.
        kept = {name: value for name, value in self.__dict__.items() if not callable(value)}
        return {name: value for name, value in kept.items() if not name.startswith("_optimizer_")}

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """Group by group, as gradients and ``mask_bits`` are aligned."""
        return list(zip(self._names(), self._parameters(), strict=True))

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _names(self) -> list[str]:
        names: list[str] = []
        for group in self.param_groups:
            unnamed = [f"parameter {len(names) + i}" for i in range(len(group["params"]))]
            names += group.get("param_names", unnamed)
        return names

    def _aligned(self, op: str, grads: Sequence[Tensor | None] | None, parameters: list[Tensor]) -> list[Tensor | None]:
        if isinstance(grads, (str, Mapping)) or not isinstance(grads, (Iterable, NoneType)):
            raise InputError(f"{op}: expected a list of gradients in the parameters' order, got {describe(grads)}")
        aligned = [p.grad for p in parameters] if grads is None else list(grads)
        if len(aligned) != len(parameters):
            raise InputError(f"{op}: expected {len(parameters)} gradients, one for each parameter, got {len(aligned)}")
        if any(map(is_sharded, parameters)):
            aligned = [self._own_part(op, i, g, p) for i, (g, p) in enumerate(zip(aligned, parameters, strict=True))]
            parameters = all_local(parameters)
        if _fit_as_they_are(aligned, parameters):
            return aligned
        for i, gradient in enumerate(aligned):
            if gradient is None:
                continue
            if not fits(gradient):
                check_gradient(op, self._names()[i], gradient)
            if gradient.shape != parameters[i].shape:
                raise InputError(
                    f"{op}: the gradient of {self._names()[i]} has shape {list(gradient.shape)} and the parameter "
                    f"{list(parameters[i].shape)}: pass the gradients in the parameters' order"
                )
            if gradient.device != parameters[i].device:
                raise InputError(
                    f"{op}: the gradient of {self._names()[i]} is on {gradient.device}: expected one on "
                    f"{parameters[i].device}"
                )
            if gradient.dtype == torch.float64 != parameters[i].dtype:
                # What overflows the type that the step computes in must be infinite when the norms look for it.
                aligned[i] = gradient = gradient.to(_state_dtype(parameters[i]))
            if not _same_memory_order(gradient, parameters[i]):  # once here, not once in each operator
                aligned[i] = torch.empty_like(parameters[i], dtype=gradient.dtype).copy_(gradient)
        return aligned

    def _own_part(self, op: str, index: int, gradient: Tensor | None, p: Tensor) -> Tensor | None:
        if gradient is None or not is_sharded(p):
            return gradient
        if not is_sharded(gradient) or gradient.device_mesh != p.device_mesh or gradient.shape != p.shape:
            raise InputError(
                f"{op}: the gradient of {self._names()[index]} is not cut over the ranks as the parameter is: pass "
                ".grad as backward() leaves it"
            )
        return _cut_like(gradient, p)

    # --- Public steps ---------------------------------------------------------------------------------------

    @_apart
    def step(self, closure=None):
        """A retain step on ``.grad``, so that schedulers, GradScaler and accelerate find what they expect."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._retain(None)
        return loss

    @_hooked
    def forget_step(self, grads: Sequence[Tensor | None] | None = None) -> None:
        """Moves the salient weights along the forget gradients: ``grads``, aligned with the parameters, or ``.grad``.

        A None gradient skips its parameter entirely.

        Raises:
            InputError: every gradient is None, or the list has the wrong length.
            NonFiniteError: a gradient that counts is not finite (on the CPU, before anything is written).
        """
        parameters = self._parameters()
        forget = self._aligned("forget_step", grads, parameters)
        self._step("forget_step", parameters, forget, [None] * len(parameters), closes_round=False)

    @_hooked
    def retain_step(self, grads: Sequence[Tensor | None] | None = None) -> None:
        """Moves all weights along the retain gradients; closes the round on every ``slow_freq``-th call."""
        self._retain(grads)

    def _retain(self, grads: Sequence[Tensor | None] | None) -> None:
        parameters = self._parameters()
        retain = self._aligned("retain_step", grads, parameters)
        self._step("retain_step", parameters, [None] * len(parameters), retain, closes_round=True)

    @_hooked
    def joint_step(
        self, forget_grads: Sequence[Tensor | None], retain_grads: Sequence[Tensor | None] | None = None
    ) -> None:
        """Both gradients, taken at the same weights, in one pass: the Euclidean special case of the paper.

        It uses the retain state (and rule, and rate). With ``protect=True`` it is a masked step as a whole: weights
        outside the mask do not move.
        """
        parameters = self._parameters()
        forget = self._aligned("joint_step", forget_grads, parameters)
        retain = self._aligned("joint_step", retain_grads, parameters)
        self._step("joint_step", parameters, forget, retain, closes_round=True)

    def step_in_backward(self, side: str) -> contextlib.AbstractContextManager[None]:
        """Makes the ``forget`` or ``retain`` step within a backward pass, and frees each gradient at once::

            with optimizer.step_in_backward("retain"):
                loss_of(model, retain_batch).backward()

        A parameter moves when its gradient is whole (of a tied one: summed over all its uses), so that about one
        layer's gradients are alive at a time. Weights, moments and counters are afterwards those of
        :meth:`forget_step` or :meth:`retain_step` on the same gradients, to the bit; only stochastic rounding draws
        other noise, and a clip factor may differ in the last bits of float64. Step hooks of torch.optim are not called.

        Where this side is clipped, its norm is measured first, in a pass over the same graph::

            with optimizer.norm_in_backward("forget"):
                loss.backward(retain_graph=True)
            with optimizer.step_in_backward("forget"):
                loss.backward()

        A gradient that is not finite is found when others have moved already, unless the norm was measured. Nothing
        takes that back: the error says how many have, and the optimizer makes no step any more until a state is loaded.
        Load the weights with it, from a checkpoint.

        Raises:
            InputError: the norm has not been measured, a gradient is there already, or comes in parts.
            NonFiniteError: a gradient that counts is not finite (on the CPU at once).

        Source: "fused backward", and two passes to clip, as LOMO, arXiv 2306.09782.
        """
        return stepping(self, side)

    def norm_in_backward(self, side: str) -> contextlib.AbstractContextManager[None]:
        """Measures the norm by which :meth:`step_in_backward` clips the ``forget`` or ``retain`` step that follows, and
        frees each gradient at once. Nothing is written; a gradient that counts and is not finite raises."""
        return measuring(self, side)

    def check_whole(self) -> None:
        """Raises InputError after a step in the backward pass that stopped half-way."""
        if self.broken is not None:
            raise InputError(f"{self.broken}: load weights and optimizer of a checkpoint to go on")

    def raise_if_non_finite(self) -> None:
        """Raises if a gradient since the last call was not finite. Waits for the device."""
        flag, self._non_finite = self._non_finite, None
        if flag is not None and bool(flag):
            if self.in_parts:
                self.broken = "a step in the backward pass left out weights whose gradient was not finite"
                raise NonFiniteError(f"{self.broken}, and others moved: go on from a checkpoint, with a lower rate")
            raise NonFiniteError(
                "a gradient was not finite, and the steps that met it wrote nothing: lower the learning rate or "
                "forget_alpha, or set max_norm"
            )

    # --- One step -------------------------------------------------------------------------------------------

    def _step(
        self,
        op: str,
        parameters: list[Tensor],
        forget: list[Tensor | None],
        retain: list[Tensor | None],
        closes_round: bool,
    ) -> None:
        self.check_whole()
        self.measured.clear()  # the weights will be others
        forgets = op != "retain_step"
        own_state = op == "forget_step" and self.dual_state
        masked = self.mask_bits is not None and (forgets or self.mask_scope == "all")
        prefix = "forget_" if own_state else ""
        rule = self.forget_rule if own_state else self.rule
        states = self._states(parameters)
        buckets = self._buckets(op, parameters, states, forget, retain, f"{prefix}step")
        self._make_slow_weights(states)

        clips, skip = self._clip(op, parameters, forget, retain, buckets, masked)
        interpolate = closes_round and (self.param_groups[0]["retain_steps"] + 1) % self.slow_freq == 0
        for bucket in buckets:
            self._step_bucket(
                bucket, parameters, states, forget, retain, rule, prefix, masked, clips, skip, interpolate,
                op == "forget_step",
            )  # fmt: skip
        if interpolate:
            # Weights without a gradient in this step may have been moved by others of the round.
            left = set(range(len(parameters))).difference(*(bucket.indices for bucket in buckets))
            self._interpolate([i for i in sorted(left) if "slow" in states[i]], parameters, masked, skip)
        if closes_round:
            for group in self.param_groups:
                group["retain_steps"] += 1
        self._opt_called = True  # torch's schedulers ask whether any step came before theirs

    def _buckets(
        self,
        op: str,
        parameters: list[Tensor],
        states: list[dict[str, Any]],
        forget: list[Tensor | None],
        retain: list[Tensor | None],
        counter: str,
    ) -> list[_Bucket]:
        buckets: list[_Bucket] = []
        cut = any(map(is_sharded, parameters))
        groups = [shard_groups(p) for p in parameters] if cut else [()] * len(parameters)
        start = 0
        for group in self.param_groups:
            stop = start + len(group["params"])
            kinds = (
                [gradient is not None for gradient in forget[start:stop]],
                [gradient is not None for gradient in retain[start:stop]],
                [state.get(counter, 0) + 1 for state in states[start:stop]],
                list(map(_DEVICE, parameters[start:stop])),
                groups[start:stop],
            )
            members: dict[tuple, list[int]] = {}
            if start < stop and all(values.count(values[0]) == len(values) for values in kinds):
                members[tuple(values[0] for values in kinds)] = list(range(start, stop))
            else:
                for i, kind in enumerate(zip(*kinds, strict=True), start):
                    members.setdefault(kind, []).append(i)
            start = stop
            buckets += [
                _Bucket(group, found, *kind[:3], kind[4]) for kind, found in members.items() if kind[0] or kind[1]
            ]
        if not buckets:
            raise InputError(f"{op}: every gradient is None; call backward() on a loss of these parameters first")
        return buckets

    def _clip(self, op, parameters, forget, retain, buckets, masked) -> tuple[tuple[Any, Any], Any]:
        """The two clip factors and the flag that a gradient is not finite: numbers on the CPU, where nothing waits for
        them, else 0-d tensors on the parameters' device."""
        home = parameters[buckets[0].indices[0]].device
        on_cpu = home.type == "cpu"
        by_ranks: dict[tuple[Any, ...], list[Any]] = {}  # weighted forget, weighted retain, non-finite, product
        for bucket in buckets:
            squares = by_ranks.setdefault(bucket.ranks, [0.0, 0.0, 0.0, 0.0])
            products = ops.gradient_products(
                [forget[i] for i in bucket.indices] if bucket.has_forget else (),
                [retain[i] for i in bucket.indices] if bucket.has_retain else (),
                [self.mask_bits[i] for i in bucket.indices] if masked else (),
                self.mask_scope,
            )
            of_forget, of_retain, of_both, non_finite = products.tolist() if on_cpu else products.to(home)
            forget_weight, retain_weight = bucket.group["forget_weight"], bucket.group["retain_weight"]
            squares[0] = squares[0] + of_forget * forget_weight**2
            squares[1] = squares[1] + of_retain * retain_weight**2
            squares[2] = squares[2] + non_finite
            squares[3] = squares[3] + of_both * (forget_weight * retain_weight)
        squares = [sum(parts) for parts in zip(*itertools.starmap(_over_ranks, by_ranks.items()), strict=True)]
        skip = squares[2] > 0
        if not on_cpu:
            self._non_finite = skip if self._non_finite is None else self._non_finite | skip
        elif skip:
            self._raise_non_finite(op, parameters, forget, retain, masked)
        clips = [
            clip_factor(limit, square)
            for limit, square in zip((self.max_norm, self.retain_max_norm), squares[:2], strict=True)
        ]
        if op != "retain_step":
            self.last_clip = as_scalar(clips[0])
        if self.project and op == "joint_step":
            share = clips[0] * _conflict(squares[3], squares[1])
            self.last_projection = as_scalar(share)
            clips[1] = clips[1] + share
        return (clips[0], clips[1]), skip

    def _raise_non_finite(self, op, parameters, forget, retain, masked) -> None:
        found = self._first_non_finite(parameters, forget, retain, masked)
        where = "a gradient is not finite in the part of it that another rank holds"
        if found is not None:
            where = f"the {found[0]} gradient of {found[1]} is not finite"
        raise NonFiniteError(
            f"{op}: {where} and no weight was changed: lower the learning rate or forget_alpha, or set max_norm"
        )

    def _first_non_finite(self, parameters, forget, retain, masked) -> tuple[str, str] | None:
        """The side and the name of a gradient that is not finite where it counts."""
        parameters = all_local(parameters)
        for i, name in enumerate(self._names()):
            for part, gradient in (("forget", forget[i]), ("retain", retain[i])):
                if gradient is None or torch.isfinite(gradient).all():
                    continue
                if masked and (part == "forget" or self.mask_scope == "all"):
                    keep = ops.unpack_bits([self.mask_bits[i]], [parameters[i]])[0]
                    if torch.isfinite(torch.where(keep, gradient, 0)).all():
                        continue
                return part, name
        return None

    def _step_bucket(
        self, bucket, parameters, states, forget, retain, rule, prefix, masked, clips, skip, interpolate, forget_only
    ) -> None:
        group, indices = bucket.group, bucket.indices
        if rule == "momentum" and not group["momentum"]:
            rule = "sgd"  # as torch.optim.SGD, which leaves the buffers as they are; a schedule may come back to them
        weights, states = [parameters[i] for i in indices], [states[i] for i in indices]
        moments = [all_local(self._moments(weights, states, prefix + name)) for name in _MOMENTS[rule]]
        weights = all_local(weights)
        interpolate = interpolate and group["slow_rate"] != 1.0
        device = weights[0].device
        ops.step_(
            weights,
            rule=rule,
            scalars=ops.scalars(
                lr=self._forget_rate(group) if forget_only else group["lr"],
                forget_weight=group["forget_weight"],
                retain_weight=group["retain_weight"],
                forget_clip=clips[0],
                retain_clip=clips[1],
                weight_decay=group["weight_decay"],
                step=bucket.count,
                slow_rate=group["slow_rate"],
                skip=skip,
                device=device,
                **_of_rule(group, rule),
            ),
            forget_grads=[forget[i] for i in indices] if bucket.has_forget else (),
            retain_grads=[retain[i] for i in indices] if bucket.has_retain else (),
            slow=all_local([state["slow"] for state in states]) if interpolate else (),
            first_moments=moments[0] if moments else (),
            second_moments=moments[1] if len(moments) > 1 else (),
            bits=[self.mask_bits[i] for i in indices] if masked else (),
            mask_scope=self.mask_scope,
            protect=self.protect and masked,
            rounding_seed=self._next_rounding_seed(group),
        )
        counter = f"{prefix}step"
        for state in states:
            state[counter] = bucket.count

    def _interpolate(self, indices: list[int], parameters: list[Tensor], masked: bool, skip: Any) -> None:
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        for i in indices:
            group = groups[id(parameters[i])]
            ops.step_(
                [local(parameters[i])],
                rule="sgd",
                scalars=ops.scalars(lr=0.0, slow_rate=group["slow_rate"], skip=skip, device=parameters[i].device),
                slow=[local(self.state[parameters[i]]["slow"])],
                bits=[self.mask_bits[i]] if self.protect and masked else (),
                protect=self.protect and masked,
                rounding_seed=self._next_rounding_seed(group),
            )

    def _states(self, parameters: list[Tensor]) -> list[dict[str, Any]]:
        """Each parameter's state. Hashing a tensor is a call into Python, and the states mostly stand in order."""
        if len(self.state) == len(parameters) and all(map(is_, self.state, parameters)):
            return list(self.state.values())
        return [self.state[p] for p in parameters]

    @staticmethod
    def _moments(weights: list[Tensor], states: list[dict[str, Any]], name: str) -> list[Tensor]:
        try:
            return [state[name] for state in states]
        except KeyError:  # the first step of some
            pass
        for p, state in zip(weights, states, strict=True):
            if name not in state:
                state[name] = torch.zeros_like(p, dtype=_state_dtype(p), memory_format=torch.preserve_format)
        return [state[name] for state in states]

    def _make_slow_weights(self, states: list[dict[str, Any]]) -> None:
        """Slow weights start where the weights are before the first step of any kind."""
        start = 0
        for group in self.param_groups:
            if group["slow_rate"] != 1.0:
                for p, state in zip(group["params"], states[start:], strict=False):
                    if "slow" not in state:
                        state["slow"] = p.detach().to(_state_dtype(p), copy=True)
            start += len(group["params"])

    @staticmethod
    def _forget_rate(group: dict[str, Any]) -> float:
        if group["forget_lr"] is None:
            return group["lr"]
        # Set by torch's schedulers, which know of `lr` only; OneCycleLR begins far below the rate that it is given.
        start = group.get("max_lr", group.get("initial_lr"))
        return group["forget_lr"] * (group["lr"] / start if start else 1.0)

    @staticmethod
    def _next_rounding_seed(group: dict[str, Any]) -> int | None:
        if group["rounding_seed"] is not None:
            group["rounding_seed"] += 1
        return group["rounding_seed"]

    # --- State ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch.optim's, and under ``settings`` what must match when it is loaded."""

        def with_settings(_: Any, state_dict: dict[str, Any]) -> None:
            state_dict["settings"] = {name: getattr(self, name) for name in _OF_THE_STATE}

        # As the first hook, so that others see all of it.
        handle = self.register_state_dict_post_hook(with_settings, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Whether a state fits, before anything is loaded.

        Raises:
            InputError: it is no optimizer's, or of other settings, another rule, or weights of other shapes.
        """
        try:
            groups, states = state_dict["param_groups"], state_dict["state"]
            settings = dict(state_dict.get("settings", {}))
            saved = [list(group["params"]) for group in groups]
            states = {index: dict(state) for index, state in states.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise InputError(
                "state_dict: expected what an optimizer's state_dict() gives, got something of another form"
            ) from None
        for name, value in settings.items():
            if value != (own := getattr(self, name, None)):
                raise InputError(
                    f"the state was saved with {name}={value!r} and the optimizer has {own!r}: build it with the same"
                )
        sizes, own = [len(group) for group in saved], [len(group["params"]) for group in self.param_groups]
        if sizes != own:
            raise InputError(
                f"the state is of groups of {sizes} parameters and the optimizer has {own}: build the same"
            )
        for group, current in zip(groups, self.param_groups, strict=True):
            values = {name: group.get(name, current.get(name, getattr(StepConfig, name))) for name in PER_GROUP}
            check_rates(self.rule, self.forget_rule, **values)
        known = {"step", "slow", *_MOMENTS[self.rule]}
        if self.dual_state:
            known |= {f"forget_{name}" for name in ("step", *_MOMENTS[self.forget_rule])}
        for index, name, p in zip(itertools.chain(*saved), self._names(), self._parameters(), strict=True):
            for key, value in states.get(index, {}).items():
                if key not in known:
                    raise InputError(f"the state of {name} holds {key}, and the optimizer keeps none: load its own")
                if key in _COUNTS:  # a number, or a tensor of one
                    one = value.reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else value
                    if as_number(one) is not None:
                        continue
                if not isinstance(value, Tensor):
                    raise InputError(f"the state {key} of {name} is {describe(value)}: load what state_dict() gave")
                if value.shape != p.shape:
                    raise InputError(
                        f"the state {key} of {name} has shape {list(value.shape)} and the parameter {list(p.shape)}: "
                        "load the state of the same model"
                    )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave, bit for bit.

        torch.optim casts state to the weight's dtype, which would round float32 moments of bfloat16 weights; here
        every tensor keeps its dtype and takes its weight's device and memory order.
        """
        entries: list[dict[str, Any]] = []  # of each parameter, in their order

        def before(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            """After all other hooks, which may have changed anything: keeps the tensors from being cast."""
            self.check_state_dict(state_dict)
            indices = list(itertools.chain(*(group["params"] for group in state_dict["param_groups"])))
            entries.extend(state_dict["state"].get(index, {}) for index in indices)
            groups = zip(state_dict["param_groups"], self.param_groups, strict=True)
            known = set(indices)
            return {
                **state_dict,
                "param_groups": [loaded_group(saved, group, self.defaults) for saved, group in groups],
                "state": {index: value for index, value in state_dict["state"].items() if index not in known},
            }

        def after(_: Any) -> None:
            """Before all other hooks, which look at what was loaded."""
            for p, saved in zip(self._parameters(), entries, strict=True):
                if saved:
                    self.state[p] = {key: _loaded(key, value, p) for key, value in saved.items()}
            self.broken = None
            self.measured.clear()

        if not isinstance(state_dict, Mapping):
            raise InputError(f"state_dict: expected what an optimizer's state_dict() gives, got {describe(state_dict)}")
        handles = self.register_load_state_dict_pre_hook(before), self.register_load_state_dict_post_hook(after, True)
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # which torch adds here, and no rule reads


def _of_rule(group: dict[str, Any], rule: str) -> dict[str, Any]:
    """The scalars that this rule alone reads."""
    if rule == "sgd":
        return {}
    if rule == "momentum":
        return {"momentum": group["momentum"]}
    beta1, beta2 = as_betas(group["betas"])  # a schedule or a user may have put anything there
    return {"beta1": beta1, "beta2": beta2, "eps": group["eps"]}


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
    return sum_over(groups, torch.tensor(sums, dtype=torch.float64, device="cpu")).tolist()


@_apart
def _loaded(key: str, value: Any, p: Tensor) -> Any:
    """A saved entry: counts as integers, a tensor on its weight's device, in its memory order, and cut over the ranks
    as it is."""
    if not isinstance(value, Tensor):
        return python_number(value)
    if key in _COUNTS:  # torch.optim and its wrappers hold them as tensors
        return int(value)
    placed = torch.empty_like(p, dtype=value.dtype)
    local(placed).copy_(_cut_like(value, p) if is_sharded(value) else part_like(value, p))
    return placed


def _cut_like(value: Tensor, p: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in the way that a parameter on the same ranks is cut."""
    return local(value if value.placements == p.placements else value.redistribute(placements=p.placements))


def _fit_as_they_are(grads: list[Tensor | None], parameters: list[Tensor]) -> bool:
    """Whether all is as it mostly is. With hundreds of small tensors, looking at each in Python costs more than moving
    their weights, so the loops here are the interpreter's own, and keep no shapes, which would wake the garbage
    collector. No says nothing: a closer look decides."""
    try:
        return (
            all(map(Tensor.is_contiguous, grads))
            and all(map(Tensor.is_contiguous, parameters))
            and all(map(eq, map(Tensor.size, grads), map(Tensor.size, parameters)))
            and all(map(eq, map(_DEVICE, grads), map(_DEVICE, parameters)))
            and (dtypes := set(map(_DTYPE, grads)))
            and dtypes <= FLOATING
            and (torch.float64 not in dtypes or set(map(_DTYPE, parameters)) == {torch.float64})
            and set(map(_LAYOUT, grads)) == {torch.strided}
        )
    except (TypeError, RuntimeError):  # a gradient is None, or sparse
        return False


def _same_memory_order(a: Tensor, b: Tensor) -> bool:
    """Equal strides, up to dimensions of one element, which address nothing."""
    if a.stride() == b.stride():
        return True
    return all(x == y or n == 1 for x, y, n in zip(a.stride(), b.stride(), a.shape, strict=True))


def _state_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32
