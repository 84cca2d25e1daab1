"""Settings of parameter groups: which of them a rule reads, their checks, and their plain Python values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..utils.arguments import check_finite, check_number, describe

__all__ = ["NOTES", "PER_GROUP", "as_betas", "check_group", "check_rates", "loaded_group", "python_number", "read_by"]

# What a parameter group may set for itself.
PER_GROUP = ("lr", "momentum", "betas", "eps", "weight_decay", "forget_weight", "retain_weight")
PER_GROUP += ("slow_rate", "forget_lr")
_READ_BY_SOME = {"momentum": ("momentum",), "betas": ("adam", "adamw"), "eps": ("adam", "adamw")}
# No settings: written into groups by torch's schedulers and by the optimizer. A group of another optimizer has them.
NOTES = ("params", "param_names", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")
NOTES += ("retain_steps", "rounding_seed")


def read_by(*rules: str) -> tuple[str, ...]:
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


def check_group(settings: dict[str, Any], defaults: dict[str, Any], *rules: str) -> None:
    """Whether a parameter group may set this for itself, and to these values; InputError if not."""
    for key in settings:
        if key not in PER_GROUP:
            raise InputError(
                f"{key} is no setting of a parameter group: a group takes {', '.join(PER_GROUP)}, and the optimizer "
                "itself the rest (wrappers that hand all arguments on to the groups, such as ZeroRedundancyOptimizer, "
                "are not supported: shard the model with fully_shard)"
            )
    check_rates(*rules, **{name: settings.get(name, defaults[name]) for name in PER_GROUP})


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
