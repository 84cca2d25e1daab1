"""Settings of the optimizer and of its parameter groups: defaults, checks, plain Python values, names."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import ops
from ..errors import InputError
from ..utils.arguments import check_choice, check_count, check_finite, check_number, describe

__all__ = ["PER_GROUP", "StepSettings", "as_betas", "check_rates", "loaded_group", "parameter_names", "prepare_group"]
__all__ += ["python_number"]

# What a parameter group may set for itself.
PER_GROUP: tuple[str, ...] = ("lr", "momentum", "betas", "eps", "weight_decay", "forget_weight", "retain_weight")
PER_GROUP += ("slow_rate", "forget_lr")
_READ_BY_SOME = {"momentum": ("momentum",), "betas": ("adam", "adamw"), "eps": ("adam", "adamw")}
# No settings: written into groups by torch's schedulers and by the optimizer. A group of another optimizer has them.
_NOTES: tuple[str, ...] = ("params", "param_names", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")
_NOTES += ("swa_lr", "retain_steps", "rounding_seed")


@dataclass(kw_only=True)
class StepSettings:
    """The optimizer's arguments with their defaults and checks; :class:`UnlearnOptimizer` says more."""

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

    def group_defaults(self) -> dict[str, Any]:
        """What the rules read, as Python's numbers: the defaults of parameter groups."""
        rules = self.rule, self.forget_rule or self.rule
        return {name: python_number(getattr(self, name)) for name in _read_by(*rules)}

    def check_group(self, settings: dict[str, Any]) -> None:
        """Whether a parameter group may set this for itself, and to these values; InputError if not."""
        defaults = {name: getattr(self, name) for name in PER_GROUP}
        _check_group(settings, defaults, self.rule, self.forget_rule or self.rule)


def parameter_names(groups: list[dict[str, Any]]) -> list[str]:
    """Names of all parameters, group by group; their numbers where they were passed without names."""
    names: list[str] = []
    for group in groups:
        unnamed = [f"parameter {len(names) + i}" for i in range(len(group["params"]))]
        names += group.get("param_names", unnamed)
    return names


def _read_by(*rules: str) -> tuple[str, ...]:
    """The settings that these rules read. Schedulers look for ``momentum`` or ``betas`` among an optimizer's defaults
    to know which of them to cycle."""
    return tuple(name for name in PER_GROUP if set(_READ_BY_SOME.get(name, rules)) & set(rules))


def as_betas(value: Any) -> tuple[float, float]:
    """Two Python floats from a tuple, a list, an array or a tensor; InputError for anything else."""
    listed = value.tolist() if isinstance(value, Tensor) else value
    sequence = hasattr(listed, "__getitem__") and not isinstance(listed, (str, bytes, dict))
    if not sequence or not hasattr(listed, "__len__") or len(listed) != 2:
        raise InputError(f"betas: expected two numbers in [0, 1), got {describe(value)}")
    for beta in listed:
        check_number("betas", beta, "two numbers in [0, 1)", _is_decay)
    return float(listed[0]), float(listed[1])


def python_number(value: Any) -> Any:
    """A NumPy number as Python's, so that a state_dict can be read back with weights_only=True; else as it is."""
    return value if isinstance(value, Tensor) or not hasattr(value, "item") else value.item()


def _check_group(settings: dict[str, Any], defaults: dict[str, Any], *rules: str) -> None:
    """Whether a parameter group may set this for itself, and to these values; InputError if not."""
    for key in settings:
        if key not in PER_GROUP:
            raise InputError(
                f"{key} is no setting of a parameter group: a group takes {', '.join(PER_GROUP)}, and the optimizer "
                "itself the rest (wrappers that hand all arguments on to the groups, such as ZeroRedundancyOptimizer, "
                "are not supported: shard the model with fully_shard)"
            )
    check_rates(*rules, **{name: settings.get(name, defaults[name]) for name in PER_GROUP})


def prepare_group(group: dict[str, Any], defaults: dict[str, Any], *rules: str) -> None:
    """Checks the settings of a parameter group that joins an optimizer of these defaults, and makes them plain."""
    unread = {name: getattr(StepSettings, name) for name in PER_GROUP if name not in defaults}
    settings = {key: value for key, value in group.items() if key not in _NOTES}
    _check_group(settings, {**unread, **defaults}, *rules)
    for name in set(PER_GROUP).intersection(group):
        group[name] = as_betas(group[name]) if name == "betas" else python_number(group[name])


def check_rates(*rules: str, **values: Any) -> None:
    """Whether the settings of a group are numbers that make sense; ``rules`` are those that may move it."""
    for name in ("lr", "eps", "weight_decay"):
        check_finite(name, values[name])
    if values["forget_lr"] is not None:
        check_finite("forget_lr", values["forget_lr"])
    for name in ("forget_weight", "retain_weight"):
        check_number(name, values[name], "a finite number", math.isfinite)
    check_number("momentum", values["momentum"], "a number in [0, 1)", _is_decay)
    if values["momentum"] and "sgd" in rules and "momentum" not in rules:
        raise InputError(f"momentum={values['momentum']} does nothing under rule='sgd': set rule='momentum'")
    check_number("slow_rate", values["slow_rate"], "a rate in (0, 1]", lambda x: 0.0 < x <= 1.0)
    as_betas(values["betas"])


def loaded_group(saved: dict[str, Any], current: dict[str, Any], defaults: Iterable[str]) -> dict[str, Any]:
    """A group of a state_dict with what a file of JSON or an older version leaves out of it."""
    group = {**{name: current[name] for name in defaults if name in current}, **saved}
    if "betas" in group:
        group["betas"] = as_betas(group["betas"])
    return group


def _is_decay(x: float) -> bool:
    return 0.0 <= x < 1.0
