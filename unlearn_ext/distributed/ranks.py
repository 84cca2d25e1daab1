"""The processes that run one model together: what they sum, and which part of a batch is whose."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DamagedError, InputError, LostRankError, UnlearnError, first_line
from .shards import is_sharded
from .wrappers import reshard, unwrapped

__all__ = ["ALONE", "Ranks"]


@dataclass(frozen=True)
class Ranks:
    """The ranks over which a model's gradients are averaged.

    Attributes:
        size: how many; 1 without torch.distributed.
        rank: which one this process is.
        group: the process group; None where there is one rank.
    """

    size: int = 1
    rank: int = 0
    group: Any = None

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """Those of a model in DistributedDataParallel, or sharded by ``fully_shard``.

        Raises:
            InputError: there are several ranks and the model is neither, or it is cut over some of them only.
        """
        distributed = torch.distributed
        if not distributed.is_available() or not distributed.is_initialized():
            return ALONE
        world = distributed.get_world_size()
        if world == 1:
            return ALONE
        if (replicated := _replicated(model)) is not None:
            group = replicated.process_group
            if distributed.get_world_size(group) != world:
                raise InputError("DistributedDataParallel has a group of its own: let it span all ranks")
            return cls(world, distributed.get_rank(), group)
        reshard(model)
        named = list(unwrapped(model).named_parameters())
        meshes = {p.device_mesh for _, p in named if is_sharded(p)}
        if not meshes:
            raise InputError(
                f"there are {world} ranks and the model is on each of them alone: wrap it in DistributedDataParallel, "
                "or call fully_shard on it"
            )
        alone = [name for name, p in named if p.requires_grad and not is_sharded(p)]
        if alone:
            raise InputError(
                f"{alone[0]} is whole on every rank where other weights are sharded, and nothing averages its "
                "gradient: call fully_shard on the model as a whole, after its blocks"
            )
        if any(mesh.size() != world for mesh in meshes):
            raise InputError(f"the model is sharded over a part of the {world} ranks: shard it over all of them")
        return cls(world, distributed.get_rank(), distributed.group.WORLD)

    @property
    def first(self) -> bool:
        """Whether this process writes what all have in common."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This rank's samples of a batch: consecutive ones, as even as can be, and the first ranks' parts larger."""
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def gather(self, values: Tensor) -> Tensor:
        """``values`` [n] of every rank, [size, n], on all of them."""
        if self.group is None:
            return values[None]
        found = [torch.empty_like(values) for _ in range(self.size)]
        torch.distributed.all_gather(found, values.contiguous(), group=self.group)
        return torch.stack(found)

    def sum(self, values: Tensor) -> Tensor:
        """In place, over the ranks."""
        if self.group is not None:
            torch.distributed.all_reduce(values, group=self.group)
        return values

    def gather_objects(self, value: Any) -> list[Any]:
        """Everybody's, in the order of the ranks, on all of them."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value, group=self.group)
        return found

    def from_first(self, value: Any) -> Any:
        """What the first rank has."""
        if self.group is None:
            return value
        found = [value]
        torch.distributed.broadcast_object_list(found, src=0, group=self.group)
        return found[0]

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """A rank that has ended shows in what the others wait for: it becomes a LostRankError."""
        try:
            yield
        except RuntimeError as error:
            if self.group is None or isinstance(error, UnlearnError) or not _is_lost(error):
                raise
            raise LostRankError(
                f"another rank has ended or cannot be reached ({first_line(error)}): see its own message, and go on "
                "from the last checkpoint (resume_from_checkpoint='latest'), with as many ranks as there are"
            ) from None

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What the user can mend on one rank ends all of them, with its sentence, where they would wait for it.

        The block must not wait for other ranks itself.
        """
        error: UnlearnError | OSError | None = None
        try:
            yield
        except (UnlearnError, OSError) as found:
            error = found
        if self.group is None:
            if error is not None:
                raise error
            return
        told = self.gather_objects(None if error is None else (str(error), isinstance(error, DamagedError)))
        if error is not None:
            raise error
        for rank, what in enumerate(told):
            if what is not None:
                raise (DamagedError if what[1] else InputError)(f"rank {rank}: {what[0]}")


ALONE = Ranks()


def _is_lost(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _replicated(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel among a model's wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return model
        if isinstance(model, nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return None
