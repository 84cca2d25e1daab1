"""Whether a model's weights are such that a run can train them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import InputError
from .wrappers import own_names, reshard, unwrapped

__all__ = ["check_loaded", "check_same", "check_weights", "forms"]


def check_weights(model: nn.Module) -> None:
    """Raises InputError for weights and buffers without values, and such as no gradient can pass."""
    own = unwrapped(model)
    if parametrize._cache_enabled and any(map(parametrize.is_parametrized, own.modules())):
        raise InputError(
            "torch.nn.utils.parametrize.cached() keeps what weights were before a step: train and measure outside of it"
        )
    for name, tensor in itertools.chain(own.named_parameters(), own.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise InputError(f"{name} has no shape yet: pass a batch through the model before it is trained")
        if tensor.is_meta:
            raise InputError(
                f"{name} is on the meta device and has no values: load the whole model onto a device before it is "
                "trained, without offloading"
            )
        if tensor.is_inference():
            raise InputError(
                f"{name} was made in torch.inference_mode() and cannot be trained: build or load the model outside of "
                "it"
            )
    for path, module in own.named_modules():
        for name in ("weight", "bias") if not module._forward_pre_hooks else ():  # which make weights anew
            value = vars(module).get(name)
            if isinstance(value, Tensor) and value.requires_grad:
                raise InputError(
                    f"{path + '.' if path else ''}{name} is a plain tensor that requires grad, and no parameter, so "
                    "it would be neither trained nor saved: set it to nn.Parameter(tensor.detach())"
                )


def check_loaded(model: nn.Module) -> None:
    """Raises InputError for weights without values, where no hook of accelerate's brings them for each call."""
    for name, p in unwrapped(model).named_parameters():
        if p.is_meta and not any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise InputError(f"{name} is on the meta device and has no values: load the model's weights first")


def forms(model: nn.Module) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """Each parameter, of a sharded model its part, and what a run counts on."""
    reshard(model)
    return {
        name: (
            p,
            {
                "requires_grad": p.requires_grad,
                "dtype": p.dtype,
                "device": p.device,
                "shape": list(p.shape),
                "strides": p.stride() if p.layout == torch.strided else None,
            },
        )
        for name, p in own_names(unwrapped(model).named_parameters()).items()
    }


def check_same(model: nn.Module, before: dict[str, tuple[Tensor, dict[str, Any]]]) -> None:
    """Raises InputError where the parameters are not those that :func:`forms` gave any more, or not as they were."""
    now = forms(model)
    for name in before | now:
        (parameter, form), (other, changed) = before.get(name, (None, {})), now.get(name, (None, {}))
        if parameter is not other:
            what = "was replaced, added or removed"
        elif form != changed:
            key = next(key for key in form if form[key] != changed[key])
            what = f"has {key}={changed[key]} where it had {form[key]}"
        else:
            continue
        raise InputError(
            f"{name} {what} while the run was under way: change the model before run(), let evaluate() undo what it "
            "changes, or copy values into the weights (load_state_dict without assign=True)"
        )
