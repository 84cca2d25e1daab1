"""Whether a model's weights are such that a run can train them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ._names import trainable, unwrapped
from .errors import InputError

__all__ = ["check_loaded", "check_same", "check_weights"]


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


def check_loaded(model: nn.Module) -> None:
    """Raises InputError for weights without values, where no hook of accelerate's brings them for each call."""
    for name, p in unwrapped(model).named_parameters():
        if p.is_meta and not any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise InputError(f"{name} is on the meta device and has no values: load the model's weights first")


def check_same(model: nn.Module, parameters: Sequence[Tensor]) -> None:
    """Raises InputError where the model does not hold the weights that a run trains any more."""
    trained = {id(p) for p in parameters}
    unfrozen = any(id(p) not in trained for p in trainable(model).values())  # of a sharded model the parts come first
    if unfrozen or not trained <= {id(p) for p in unwrapped(model).parameters()}:
        raise InputError(
            "the model's weights were replaced, or others were unfrozen, while the run was under way: change the model "
            "before run(), or copy values into its weights (load_state_dict without assign=True)"
        )
