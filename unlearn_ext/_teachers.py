"""The frozen networks that a run compares its model with."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from ._hashing import weights_hash
from ._names import trainable, unwrapped
from ._ranks import Ranks
from ._shards import is_sharded
from .errors import InputError

if TYPE_CHECKING:
    from .methods import Method

__all__ = ["check_teachers", "make_teachers"]


def make_teachers(model: nn.Module, method: Method) -> dict[str, nn.Module]:
    """Those that the method asks for, by name: frozen, in eval mode, and without gradients. ``original`` holds the
    weights and buffers that the model has now."""
    found: dict[str, nn.Module] = {}
    for name in dict.fromkeys((method.forget_teacher, method.retain_teacher)):
        if name == "original":
            found[name] = _frozen(unwrapped(model))
        elif name is not None:
            given, seed = getattr(method, "random_model", None), getattr(method, "seed", 0)
            found[name] = _drawn_anew(unwrapped(model), seed) if given is None else _frozen(given)
    device = next(iter(trainable(model).values())).device
    return {name: teacher.to(device) for name, teacher in found.items()}


def check_teachers(model: nn.Module, method: Method, ranks: Ranks) -> None:
    """Raises InputError where the teachers cannot be made; makes none."""
    asked = {method.forget_teacher, method.retain_teacher} - {None}
    for name in sorted(asked - {"original", "random"}, key=repr):
        raise InputError(
            f"{method.name} compares with a network called {name!r}, which is not known: its forget_teacher and "
            "retain_teacher have to be 'original', 'random' or None"
        )
    if asked and any(map(is_sharded, model.parameters())):
        raise InputError(
            f"{method.name} keeps a frozen copy of the model beside it, which is not made of sharded weights: use "
            "DistributedDataParallel, or one process"
        )
    random_model = getattr(method, "random_model", None)
    if "random" in asked and random_model is not None:
        given = ranks.gather_objects(weights_hash(random_model.state_dict().items()))
        if len(set(given)) > 1:
            raise InputError("the ranks were given different networks as random_model: seed it, or load it from a file")
    elif "random" in asked:
        remedy = "pass random_model, the same network untrained" if hasattr(method, "random_model") else "give it one"
        for name, module in unwrapped(model).named_modules():
            own = [*module.parameters(recurse=False)]
            if own and not callable(getattr(module, "reset_parameters", None)):
                raise InputError(
                    f"{method.name} compares with a network of random weights, and {name or 'the model itself'} (a "
                    f"{type(module).__name__}) has no reset_parameters to draw them: {remedy}"
                )


def _frozen(model: nn.Module) -> nn.Module:
    gradients = [(p, p.grad) for p in model.parameters()]
    for p, _ in gradients:
        p.grad = None  # else they would be copied
    try:
        return copy.deepcopy(model).requires_grad_(False).eval()
    finally:
        for p, gradient in gradients:
            p.grad = gradient


def _drawn_anew(model: nn.Module, seed: int) -> nn.Module:
    """The same network as its modules' own ``reset_parameters`` initialise it, alike on every rank."""
    drawn = _frozen(model).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        for module in drawn.modules():
            if callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()
    return drawn
