"""The optimizer's state_dict: which of its settings must match, checks before it is loaded, and loading."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import is_sharded, local, part_like
from ..errors import InputError
from ..utils.arguments import as_number, describe
from .config import PER_GROUP, StepSettings, check_rates, loaded_group, parameter_names, python_number
from .gradients import cut_like
from .step import MOMENTS, apart

__all__ = ["MUST_MATCH", "check_state", "loaded_entry", "take_entries"]

# Settings that must match when a state_dict is loaded.
MUST_MATCH = ("rule", "forget_rule", "dual_state", "mask_scope", "protect", "slow_freq")
_COUNTS = ("step", "forget_step")  # of the steps that a weight's moments have seen


def check_state(state_dict: Any, settings: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Whether a state fits an optimizer of these ``settings`` (:data:`MUST_MATCH`) and parameter groups.

    Raises:
        InputError: it is no optimizer's, or of other settings, another rule, or weights of other shapes.
    """
    try:
        saved_groups, states = state_dict["param_groups"], state_dict["state"]
        saved_settings = dict(state_dict.get("settings", {}))
        saved = [list(group["params"]) for group in saved_groups]
        states = {index: dict(state) for index, state in states.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(
            "state_dict: expected what an optimizer's state_dict() gives, got something of another form"
        ) from None
    for name, value in saved_settings.items():
        if value != (current := settings.get(name)):
            raise InputError(
                f"the state was saved with {name}={value!r} and the optimizer has {current!r}: build it with the same"
            )
    sizes, expected = [len(group) for group in saved], [len(group["params"]) for group in groups]
    if sizes != expected:
        raise InputError(
            f"the state is of groups of {sizes} parameters and the optimizer has {expected}: build the same"
        )
    for group, into in zip(saved_groups, groups, strict=True):
        values = {name: group.get(name, into.get(name, getattr(StepSettings, name))) for name in PER_GROUP}
        check_rates(settings["rule"], settings["forget_rule"], **values)
    known = {"step", "slow", *MOMENTS[settings["rule"]]}
    if settings["dual_state"]:
        known |= {f"forget_{name}" for name in ("step", *MOMENTS[settings["forget_rule"]])}
    parameters = [p for group in groups for p in group["params"]]
    for index, name, p in zip(itertools.chain(*saved), parameter_names(groups), parameters, strict=True):
        for key, value in states.get(index, {}).items():
            if key not in known:
                raise InputError(f"the state of {name} holds {key}, and the optimizer keeps none: load its own")
            _check_entry(name, key, value, p)


def _check_entry(name: str, key: str, value: Any, p: Tensor) -> None:
    if key in _COUNTS:  # a number, or a tensor of one
        one = value.reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else value
        if as_number(one) is not None:
            return
    if not isinstance(value, Tensor):
        raise InputError(f"the state {key} of {name} is {describe(value)}: load what state_dict() gave")
    if value.shape != p.shape:
        raise InputError(
            f"the state {key} of {name} has shape {list(value.shape)} and the parameter {list(p.shape)}: load the "
            "state of the same model"
        )


def take_entries(
    state_dict: dict[str, Any], groups: list[dict[str, Any]], defaults: Iterable[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A checked state_dict without the parameters' entries, which torch.optim would cast; and these, in their order."""
    indices = list(itertools.chain(*(group["params"] for group in state_dict["param_groups"])))
    pairs, known = zip(state_dict["param_groups"], groups, strict=True), set(indices)
    rest = {
        **state_dict,
        "param_groups": [loaded_group(saved, group, defaults) for saved, group in pairs],
        "state": {index: value for index, value in state_dict["state"].items() if index not in known},
    }
    return rest, [state_dict["state"].get(index, {}) for index in indices]


@apart
def loaded_entry(key: str, value: Any, p: Tensor) -> Any:
    """A saved entry: counts as integers, a tensor on its weight's device, in its memory order, and cut over the ranks
    as it is."""
    if not isinstance(value, Tensor):
        return python_number(value)
    if key in _COUNTS:  # torch.optim and its wrappers hold them as tensors
        return int(value)
    placed = torch.empty_like(p, dtype=value.dtype)
    local(placed).copy_(cut_like(value, p) if is_sharded(value) else part_like(value, p))
    return placed
