"""What a model holds besides ordinary tensors: other and non-persistent buffers, and what ``get_extra_state`` gives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

from ..distributed.wrappers import own_names, unwrapped
from ..errors import InputError
from .packing import Packer, is_plain, put, unpack
from .signs import bit_sums

__all__ = ["all_tensors", "check_storable", "forms", "pack_module", "plain_tensors", "unpack_module"]
__all__ += ["unsaved_sums"]

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


def unsaved_sums(model: nn.Module) -> dict[str, Any]:
    """By plain name, of buffers that no ``state_dict`` has: what changes when one is written to. Only of those that
    are plain tensors, or None."""
    buffers = {name: module._buffers[key] for name, (module, key) in _unsaved(model).items()}
    plain = {name: value for name, value in buffers.items() if value is not None and is_plain(value)}
    forms = {
        name: [_form(value), sums]
        for (name, value), sums in zip(plain.items(), bit_sums([*plain.values()]), strict=True)
    }
    return {name: forms.get(name) for name, value in buffers.items() if value is None or name in forms}


def _unsaved(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Places of buffers that no ``state_dict`` has, by plain name."""
    return own_names(
        (f"{path}.{name}".lstrip("."), (module, name))
        for path, module in unwrapped(model).named_modules()
        for name in sorted(module._non_persistent_buffers_set)
        if name in module._buffers
    )


def pack_module(model: nn.Module, packer: Packer, written: Collection[str] = ()) -> dict[str, Any]:
    """JSON, and tensors in ``packer``: of buffers that are not plain, of extra state by the module's name, and of those
    non-persistent buffers that are ``written`` to."""
    places = _unsaved(model)
    buffers = {name: places[name][0]._buffers[places[name][1]] for name in written}
    odd = {name: value for name, value in all_tensors(model).items() if not is_plain(value)}
    return {
        "tensors": {name: packer.pack(value, f"{name} of the model") for name, value in odd.items()},
        "forms": {name: [list(form[0]), form[1]] for name, form in ((n, _form(v)) for n, v in odd.items())},
        "extra": {
            name: packer.pack(module.get_extra_state(), f"what get_extra_state of {name or 'the model'} returns")
            for name, module in _with_extra_state(model).items()
        },
        "buffers": {name: packer.pack(value, f"{name} of the model") for name, value in buffers.items()},
    }


def unpack_module(model: nn.Module, document: Mapping[str, Any], tensors: Callable[[str], Tensor]) -> None:
    """Puts back what :func:`pack_module` took; the plain tensors have been restored."""
    targets = all_tensors(model)
    for name, packed in document["tensors"].items():
        put(targets[name], unpack(packed, tensors))
    modules = _with_extra_state(model)
    for name, packed in document["extra"].items():
        modules[name].set_extra_state(unpack(packed, tensors))
    places = _unsaved(model)
    for name, packed in document["buffers"].items():
        if name not in places:
            continue
        (module, key), value = places[name], unpack(packed, tensors)
        now = module._buffers[key]
        if now is not None and value is not None and _form(now) == _form(value):
            put(now, value)
        else:  # a cache that has grown, or is not there yet
            module._buffers[key] = value


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
