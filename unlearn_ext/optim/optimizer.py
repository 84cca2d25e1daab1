"""UnlearnOptimizer: a torch.optim.Optimizer whose step is the fused unlearning update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor

from ..distributed.shards import all_local
from ..errors import InputError, NonFiniteError
from ..ops.checks import check_writable
from ..saliency import SaliencyMask
from ..utils.arguments import check_choice, check_instance, describe
from ..utils.gradients import check_parameters
from .config import StepSettings, parameter_names, prepare_group, python_number
from .gradients import Gradients, align_gradients
from .in_backward import LIMITS, measuring, stepping
from .state import MUST_MATCH, check_state, loaded_entry, take_entries
from .step import Function, Step, apart, run_step

__all__ = ["StepConfig", "UnlearnOptimizer"]


@dataclass(kw_only=True)
class StepConfig(StepSettings):
    """The optimizer's arguments, once for the optimizer and for every method. :class:`UnlearnOptimizer` says more."""

    def make_optimizer(self, params_or_named_params: Iterable[Any], mask: SaliencyMask | None) -> UnlearnOptimizer:
        arguments = {field.name: getattr(self, field.name) for field in fields(StepSettings)}
        # A method's may be of classes that say that nobody gave them, which a saved state would not hold.
        arguments |= {"rule": str(self.rule), "momentum": float(self.momentum)}
        return UnlearnOptimizer(list(params_or_named_params), mask=mask, **arguments)


def _hooked(step: Function) -> Function:
    """Fires the step hooks of torch.optim, which wraps step() alone by itself."""
    return cast("Function", torch.optim.Optimizer.profile_hook_step(apart(step)))


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
        settings = StepSettings(
            rule=rule, lr=lr, momentum=momentum, betas=betas, eps=eps, weight_decay=weight_decay, max_norm=max_norm,
            retain_max_norm=retain_max_norm, forget_weight=forget_weight, retain_weight=retain_weight,
            slow_rate=slow_rate, slow_freq=slow_freq, mask_scope=mask_scope, protect=protect, dual_state=dual_state,
            forget_rule=forget_rule, forget_lr=forget_lr, stochastic_rounding=stochastic_rounding, project=project,
        )  # fmt: skip
        if mask is not None:
            check_instance("mask", mask, SaliencyMask, "SaliencyMask.load(path)")
        elif protect:
            raise InputError("protect=True needs a mask that says what to protect")
        self.rule, self.forget_rule = rule, forget_rule or rule
        self.max_norm, self.retain_max_norm = python_number(max_norm), python_number(retain_max_norm)
        self.slow_freq, self.mask_scope, self.protect, self.dual_state = int(slow_freq), mask_scope, protect, dual_state
        self.project = project
        # What steps leave behind: step.Record.
        self.last_clip: Tensor | None = None
        self.last_projection: Tensor | None = None
        self.non_finite: Tensor | None = None
        self.broken: str | None = None
        self.in_parts = False
        self.measured: dict[str, tuple[Any, Any]] = {}
        self.mask_bits: list[Tensor] | None = None
        # Progress within the round and noise stand in the groups, so that state_dict carries them.
        defaults = settings.group_defaults() | {"retain_steps": 0, "rounding_seed": None}
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
            prepare_group(param_group, self.defaults, self.rule, self.forget_rule)
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
        return parameter_names(self.param_groups)

    def _align(self, op: str, grads: Sequence[Tensor | None] | None, parameters: list[Tensor]) -> Gradients:
        return align_gradients(op, grads, parameters, lambda i: self._names()[i])

    # --- Public steps ---------------------------------------------------------------------------------------

    @apart
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
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
        forget = self._align("forget_step", grads, parameters)
        self._run("forget_step", parameters, forget, [None] * len(parameters))

    @_hooked
    def retain_step(self, grads: Sequence[Tensor | None] | None = None) -> None:
        """Moves all weights along the retain gradients; closes the round on every ``slow_freq``-th call."""
        self._retain(grads)

    def _retain(self, grads: Sequence[Tensor | None] | None) -> None:
        parameters = self._parameters()
        retain = self._align("retain_step", grads, parameters)
        self._run("retain_step", parameters, [None] * len(parameters), retain)

    @_hooked
    def joint_step(
        self, forget_grads: Sequence[Tensor | None], retain_grads: Sequence[Tensor | None] | None = None
    ) -> None:
        """Both gradients, taken at the same weights, in one pass: the Euclidean special case of the paper.

        It uses the retain state (and rule, and rate). With ``protect=True`` it is a masked step as a whole: weights
        outside the mask do not move.
        """
        parameters = self._parameters()
        forget = self._align("joint_step", forget_grads, parameters)
        retain = self._align("joint_step", retain_grads, parameters)
        self._run("joint_step", parameters, forget, retain)

    @contextlib.contextmanager
    def step_in_backward(self, side: str) -> Iterator[None]:
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
        with stepping(self._make_step_in_backward(side), side):
            yield
        self._opt_called = True

    @contextlib.contextmanager
    def norm_in_backward(self, side: str) -> Iterator[None]:
        """Measures the norm by which :meth:`step_in_backward` clips the ``forget`` or ``retain`` step that follows, and
        frees each gradient at once. Nothing is written; a gradient that counts and is not finite raises."""
        with measuring(self._make_step_in_backward(side), side):
            yield

    def check_whole(self) -> None:
        """Raises InputError after a step in the backward pass that stopped half-way."""
        if self.broken is not None:
            raise InputError(f"{self.broken}: load weights and optimizer of a checkpoint to go on")

    def raise_if_non_finite(self) -> None:
        """Raises if a gradient since the last call was not finite. Waits for the device."""
        flag, self.non_finite = self.non_finite, None
        if flag is not None and bool(flag):
            if self.in_parts:
                self.broken = "a step in the backward pass left out weights whose gradient was not finite"
                raise NonFiniteError(f"{self.broken}, and others moved: go on from a checkpoint, with a lower rate")
            raise NonFiniteError(
                "a gradient was not finite, and the steps that met it wrote nothing: lower the learning rate or "
                "forget_alpha, or set max_norm"
            )

    # --- One step -------------------------------------------------------------------------------------------

    def _run(self, op: str, parameters: list[Tensor], forget: list[Tensor | None], retain: list[Tensor | None]) -> None:
        run_step(self._make_step(op, parameters, forget, retain))
        self._opt_called = True  # torch's schedulers ask whether any step came before theirs

    def _make_step(self, op: str, parameters: list[Tensor], forget: Gradients, retain: Gradients) -> Step:
        self.check_whole()
        has_state = op == "forget_step" and self.dual_state
        masked = self.mask_bits is not None and (op != "retain_step" or self.mask_scope == "all")
        last_of_round = (self.param_groups[0]["retain_steps"] + 1) % self.slow_freq == 0
        return Step(
            op=op,
            groups=self.param_groups,
            parameters=parameters,
            forget=forget,
            retain=retain,
            bits=self.mask_bits if masked else None,
            mask_scope=self.mask_scope,
            protect=self.protect and masked,
            state=self.state,
            rule=self.forget_rule if has_state else self.rule,
            prefix="forget_" if has_state else "",
            limits=(self.max_norm, self.retain_max_norm),
            project=self.project,
            closes_round=op != "forget_step" and last_of_round,
            record=self,
        )

    def _make_step_in_backward(self, side: str) -> Step:
        """A step whose lists of gradients are empty; the backward pass puts them in one by one."""
        check_choice("side", side, LIMITS)
        parameters = self._parameters()
        return self._make_step(f"{side}_step", parameters, [None] * len(parameters), [None] * len(parameters))

    # --- State ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch.optim's, and under ``settings`` what must match when it is loaded."""

        def with_settings(_: Any, state_dict: dict[str, Any]) -> None:
            state_dict["settings"] = self._settings()

        # As the first hook, so that others see all of it.
        handle = self.register_state_dict_post_hook(with_settings, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in MUST_MATCH}

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Whether a state fits, before anything is loaded.

        Raises:
            InputError: it is no optimizer's, or of other settings, another rule, or weights of other shapes.
        """
        check_state(state_dict, self._settings(), self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave, bit for bit.

        torch.optim casts state to the weight's dtype, which would round float32 moments of bfloat16 weights; here
        every tensor keeps its dtype and takes its weight's device and memory order.
        """
        entries: list[dict[str, Any]] = []  # of each parameter, in their order

        def before(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            """After all other hooks, which may have changed anything: keeps the tensors from being cast."""
            self.check_state_dict(state_dict)
            rest, taken = take_entries(state_dict, self.param_groups, self.defaults)
            entries.extend(taken)
            return rest

        def after(_: Any) -> None:
            """Before all other hooks, which look at what was loaded."""
            for p, saved in zip(self._parameters(), entries, strict=True):
                if saved:
                    self.state[p] = {key: loaded_entry(key, value, p) for key, value in saved.items()}
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
