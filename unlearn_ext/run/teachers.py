"""The frozen networks that a run compares its model with."""

from __future__ import annotations

import copy
from types import FunctionType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from ..distributed.hashing import weights_hash
from ..distributed.ranks import Ranks
from ..distributed.shards import is_sharded
from ..distributed.weights import check_weights
from ..distributed.wrappers import trainable, unwrapped
from ..errors import InputError, first_line

if TYPE_CHECKING:
    from ..methods import Method

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
        check_weights(random_model)
        # A hash of all weights, in vain where there is nobody to compare it with.
        given = ranks.gather_objects(weights_hash(random_model.state_dict().items()) if ranks.size > 1 else "")
        if len(set(given)) > 1:
            raise InputError("the ranks were given different networks as random_model: seed it, or load it from a file")
    elif "random" in asked:
        remedy = "pass random_model, the same network untrained" if hasattr(method, "random_model") else "give it one"
        for name, module in unwrapped(model).named_modules():
            if _is_computed(module):
                raise InputError(
                    f"{method.name} compares with a network of random weights, and the weights of "
                    f"{name or 'the model itself'} are computed from others (weight or spectral norm, "
                    f"pruning, a parametrization), which reset_parameters does not draw: {remedy}"
                )
            own = [*module.parameters(recurse=False)]
            if own and not callable(getattr(module, "reset_parameters", None)):
                raise InputError(
                    f"{method.name} compares with a network of random weights, and {name or 'the model itself'} (a "
                    f"{type(module).__name__}) has no reset_parameters to draw them: {remedy}"
                )


def _is_computed(module: nn.Module) -> bool:
    """Whether one of its weights is no parameter of its own but a function of some: of ``weight_g`` and ``weight_v``,
    ``weight_orig``, as torch.nn.utils' norms and pruning have it, or under a parametrization."""
    values = [name for name, value in vars(module).items() if isinstance(value, Tensor)]
    own = list(module.named_parameters(recurse=False))
    by_hook = any(parameter.startswith(f"{name}_") for parameter, _ in own for name in values)
    return by_hook or parametrize.is_parametrized(module)


def _frozen(model: nn.Module) -> nn.Module:
    gradients = [(p, p.grad) for p in model.parameters()]
    for p, _ in gradients:
        p.grad = None  # else they would be copied
    try:
        with _CopyingValues():
            frozen = copy.deepcopy(model)
    except (TypeError, RuntimeError) as error:  # RuntimeError: of a tensor's class
        raise InputError(
            f"the method keeps a frozen copy of the model, and Python cannot copy it ({first_line(error)}): take what "
            "is in the way off the model while the run goes on, or give its class a __deepcopy__"
        ) from None
    finally:
        for p, gradient in gradients:
            p.grad = gradient
    _check_forward(model, frozen)
    for p in frozen.parameters():  # one by one, and copies of scripted ones are no leaves
        p.detach_()
    return frozen.eval()


def _check_forward(model: nn.Module, copied: nn.Module) -> None:
    """Raises InputError for a function in the place of a module's forward: Python does not copy functions, so that of
    the copy would compute with the weights of the model."""
    for (name, module), other in zip(model.named_modules(), copied.modules(), strict=False):
        forward = vars(module).get("forward")
        if isinstance(forward, FunctionType) and vars(other).get("forward") is forward:
            raise InputError(
                f"the method keeps a frozen copy of the model, and the forward of {name or 'the model'} was replaced "
                "by a function, which in the copy would use the model's weights: compile with model.compile(), or bind "
                "a function of (self, ...) with types.MethodType(function, module)"
            )


class _CopyingValues(TorchFunctionMode):
    """Within it deepcopy takes tensors that a pass has computed, which it refuses otherwise: modules hold some, such as
    those under torch.nn.utils.weight_norm and whatever keeps its activations."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def _drawn_anew(model: nn.Module, seed: int) -> nn.Module:
    """The same network as its modules' own ``reset_parameters`` initialise it, alike on every rank."""
    drawn = _frozen(model).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        for module in drawn.modules():
            if callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()
    return drawn
