"""Runs the operators of a test session on another device, so that the operator tests need not know of devices.

A kernel for CPU tensors takes the place of the native one. It copies the storages behind its arguments to the device,
byte for byte, guard zones included, calls the operator there, and copies what the operator may write back. Whatever
the device wrote outside of a tensor therefore comes back too, and the tests' guards see it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unlearn_ext import ops
from unlearn_ext.native import loading
from unlearn_ext.ops import eager, registration

_library: torch.library.Library | None = None


def install(device: str) -> None:
    """``cpu`` runs the pure-PyTorch operators on copies: that checks this file, not a device."""
    global _library
    loading._find_or_build = lambda: None  # no CPU kernels: the ones below stand in their place
    if device != "cpu" and ops.backend(device) != "native":
        raise RuntimeError(f"there are no native kernels for {device}")
    _library = torch.library.Library("unlearn_ext", "IMPL")
    for name in registration._ARGUMENTS:
        _library.impl(name, _kernel(name, device), "CPU")


def _kernel(name: str, device: str):
    operator = getattr(torch.ops.unlearn_ext, name).default
    target = getattr(eager, name) if device == "cpu" else operator
    written = [a.alias_info is not None and a.alias_info.is_write for a in operator._schema.arguments]

    def kernel(*args: Any) -> Any:
        registration._check_operands(name, args)
        storages: dict[int, tuple[Tensor, Tensor]] = {}
        moved = [_map(arg, lambda t: _moved(t, device, storages)) for arg in args]
        result = target(*moved)
        for arg, writes in zip(args, written, strict=True):
            for tensor in arg if writes else ():
                here, there = storages[tensor.untyped_storage()._cdata]
                here.copy_(there)
        return _map(result, lambda t: t.to("cpu"))

    return kernel


def _map(value: Any, function) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(_map(entry, function) for entry in value) if isinstance(value, (list, tuple)) else value


def _moved(tensor: Tensor, device: str, storages: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    storage = tensor.untyped_storage()
    if storage._cdata not in storages:
        here = torch.empty(0, dtype=torch.uint8).set_(storage)
        storages[storage._cdata] = here, here.to(device, copy=True)
    there = storages[storage._cdata][1].untyped_storage()
    empty = torch.empty(0, dtype=tensor.dtype, device=device)
    return empty.set_(there, tensor.storage_offset(), tensor.size(), tensor.stride())
