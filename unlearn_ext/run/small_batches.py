"""Batches that leave batch normalisation a single sample, which it refuses in train mode: found before any step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import BatchSampler

from ..data import rng
from ..data.streams import length
from ..distributed.batches import cut
from ..distributed.modes import keeping_modes, put_modes, set_training
from ..distributed.ranks import Ranks
from ..distributed.shards import is_sharded
from ..distributed.wrappers import unwrapped
from ..errors import InputError

if TYPE_CHECKING:
    from ..methods import Method
    from ..tasks import Task

__all__ = ["SmallBatches"]


class SmallBatches:
    """Looks at the sizes of the batches of those ``sets`` that the method makes steps on.

    Where one leaves a process a single sample, and the model normalises batches in train mode, a forward pass of one
    sample shows whether it refuses that: a batch normalisation of images of several pixels does not. The pass moves
    no statistics and no random numbers. ``ranks`` are those of the run, and ``split_batches`` whether they share their
    batches.
    """

    def __init__(
        self, model: nn.Module, task: Task, method: Method, sets: Mapping[str, Any], ranks: Ranks, split_batches: bool
    ):
        self.model, self.task, self.ranks, self.split_batches = model, task, ranks, split_batches
        trained = {"forget": method.forgets, "retain": method.retains, "learn": method.learns}
        self._sets = {name: data for name, data in sets.items() if trained.get(name)}
        self._number: dict[str, int] = {}
        with keeping_modes(model):
            set_training(model, method.freeze_batch_norm)
            self._modes = [(module, module.training) for module in model.modules()]
        self._norms = [m for m, training in self._modes if training and isinstance(m, _BatchNorm)]
        if ranks.size > 1 and not split_batches and self._waits():
            self._norms = []
        self._refused: bool | None = None  # whether one sample is, where that has been tried

    def _waits(self) -> bool:
        """Whether a forward pass waits for the other ranks, which may have no batch of one sample."""
        synchronized = any(isinstance(norm, nn.SyncBatchNorm) for norm in self._norms)
        return synchronized or any(map(is_sharded, self.model.parameters()))

    def find(self, name: str, batch: Any, size: int) -> InputError | None:
        """What is wrong with the next batch of a set, of ``size`` samples, or with the last that its loader will
        give."""
        number = self._number[name] = self._number.get(name, -1) + 1
        if not self._norms or name not in self._sets:
            return None
        last = number > 0 and length(self._sets[name]) == number + 1
        if number == 0 and self._least(size) > 1 and (size_of_last := _last_size(self._sets[name], size)) is not None:
            size, last = size_of_last, True
        if self._least(size) > 1:
            return None
        if self._refused is None:
            self._refused = self._is_refused(batch)
        which = f"the last {name} batch" if last else f"batch {number} of the {name} set"
        return self._error(which, size, last) if self._refused else None

    def _least(self, size: int) -> int:
        """Samples that a process gets of a batch, at least."""
        return max(1, size // self.ranks.size) if self.split_batches else size

    def _error(self, which: str, size: int, last: bool) -> InputError:
        has, norm = "has one sample", ""
        if size > 1:
            has = f"has {size} samples for {self.ranks.size} ranks, which leaves one of them a single one"
            norm = "SyncBatchNorm, "
        larger = "use drop_last=True on its loader" if last else "use a larger batch_size"
        return InputError(
            f"{which} {has}, which BatchNorm refuses in train mode: {larger}, {norm}or freeze_batch_norm=True"
        )

    @torch.no_grad()
    def _is_refused(self, batch: Any) -> bool:
        model = self.model if any(map(is_sharded, self.model.parameters())) else unwrapped(self.model)
        device = next(model.parameters()).device
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        with rng.kept({"task": self.task.generators()}), keeping_modes(self.model):
            put_modes(self._modes)
            try:
                prepared = cut(self.task.prepare(batch, device), slice(0, 1))
                self.task.losses(model, prepared)
            except Exception as error:  # what else is wrong with a part of a batch need not be with the whole
                return isinstance(error, ValueError) and str(error).startswith("Expected more than 1 value per channel")
            finally:
                for buffer, before in buffers:
                    buffer.copy_(before)
        return False


def _last_size(data: Iterable[Any], first: int) -> int | None:
    """Samples of a loader's last batch, where that follows from its sampler; ``first``: of its first batch."""
    sampler = getattr(data, "batch_sampler", None)
    if type(sampler) is not BatchSampler or sampler.drop_last or first != sampler.batch_size:
        return None
    count = length(sampler.sampler)
    return None if not count else (count - 1) % first + 1
