"""What a model holds besides ordinary tensors: buffers of other kinds, and what ``get_extra_state`` gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ._names import own_names, unwrapped
from ._packing import Packer, is_plain, put, unpack
from .errors import InputError

__all__ = ["all_tensors", "check_storable", "forms", "pack_module", "plain_tensors", "unpack_module"]

_EXTRA = "_extra_state"  # torch's own suffix

Form = tuple[tuple[int, ...], Any]


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by plain name; tied ones once."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in own_names(unwrapped(model).state_dict(keep_vars=True).items()).items():
        if isinstance(value, Tensor) and id(value) not in seen and name.rpartition(".")[2] != _EXTRA:
            seen.add(id(value))
            tensors[name] = value.detach() if is_plain(value) else value
    return tensors


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Those that safetensors hold as they are."""
    return {name: value for name, value in all_tensors(model).items() if is_plain(value)}


def forms(model: nn.Module) -> dict[str, Form]:
    """Shapes and dtypes of all tensors, with their kind where it is not plain: what must agree to restore one."""
    return {name: _form(value) for name, value in all_tensors(model).items()}


def _form(value: Tensor) -> Form:
    return tuple(value.shape), value.dtype if is_plain(value) else f"{value.dtype}, {value.layout}"


def check_storable(model: nn.Module) -> None:
    """Raises InputError where a checkpoint of the model could not be written or restored; the message names what."""
    _ = pack_module(model, Packer())


def pack_module(model: nn.Module, packer: Packer) -> dict[str, Any]:
    """JSON, and tensors in ``packer``: of buffers that are not plain, and of extra state by the module's name."""
    odd = {name: value for name, value in all_tensors(model).items() if not is_plain(value)}
    return {
        "tensors": {name: packer.pack(value, f"{name} of the model") for name, value in odd.items()},
        "forms": {name: [list(form[0]), form[1]] for name, form in ((n, _form(v)) for n, v in odd.items())},
        "extra": {
            name: packer.pack(module.get_extra_state(), f"what get_extra_state of {name or 'the model'} returns")
            for name, module in _with_extra_state(model).items()
        },
    }


def unpack_module(model: nn.Module, document: Mapping[str, Any], tensors: Callable[[str], Tensor]) -> None:
    """Puts back what :func:`pack_module` took; the plain tensors have been restored."""
    targets = all_tensors(model)
    for name, packed in document["tensors"].items():
        put(targets[name], unpack(packed, tensors))
    modules = _with_extra_state(model)
    for name, packed in document["extra"].items():
        modules[name].set_extra_state(unpack(packed, tensors))


def _with_extra_state(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that have some, by plain name."""
    found = {}
    for name, module in unwrapped(model).named_modules():
        if type(module).get_extra_state is nn.Module.get_extra_state:
            continue
        if type(module).set_extra_state is nn.Module.set_extra_state:
            raise InputError(
                f"{name or 'the model'} (a {type(module).__name__}) has get_extra_state and no set_extra_state, so "
                "that a checkpoint could not be restored: define both, or leave checkpointing_steps out"
            )
        found[f"{name}.{_EXTRA}"] = module
    return {name.removesuffix(_EXTRA).removesuffix("."): module for name, module in own_names(found.items()).items()}
