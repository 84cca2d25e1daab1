"""Parameter names without the prefixes that wrappers add."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from torch import Tensor, nn

from ..errors import InputError

__all__ = ["buffers_of", "by_plain_name", "own_names", "reshard", "trainable", "unwrapped"]

Value = TypeVar("Value")

_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")  # torch.compile's, around the model or any block of it
_PARALLEL = "module."  # DistributedDataParallel's and DataParallel's, and what a model may call a part of its own


def reshard(model: nn.Module) -> None:
    """After a forward pass without a backward one ``fully_shard`` leaves whole parameters in the place of its parts."""
    module = sys.modules.get("torch.distributed.fsdp")
    for part in model.modules() if module is not None else ():
        if isinstance(part, module.FSDPModule):
            part.reshard()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, told by the wrapper's type: a model may have a part called ``module``."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def own_names(named: Iterable[tuple[str, Value]]) -> dict[str, Value]:
    """By name, without what torch.compile adds to those of compiled blocks."""
    result: dict[str, Value] = {}
    for name, value in named:
        name = _COMPILED.sub("", name)
        if name in result:
            raise InputError(f"two parameters are called {name} once wrappers' prefixes are removed: rename one")
        result[name] = value
    return result


def by_plain_name(named: Iterable[tuple[str, Value]]) -> dict[str, Value]:
    """Names of a file or a list, where nothing tells a wrapper but that every name has its prefix."""
    result = own_names(named)
    while result and all(name.startswith(_PARALLEL) for name in result):
        result = {name.removeprefix(_PARALLEL): value for name, value in result.items()}
    return result


def buffers_of(model: nn.Module) -> Iterator[tuple[tuple[nn.Module, str], Tensor]]:
    """Each buffer once, with the module that has it and its name there: a module may put another in its place."""
    seen: set[int] = set()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if id(buffer) not in seen:
                seen.add(id(buffer))
                yield (module, name), buffer


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters to be moved, by name; of a sharded model the parts, also where a pass has left it whole."""
    reshard(model)
    return own_names((n, p) for n, p in unwrapped(model).named_parameters() if p.requires_grad)
