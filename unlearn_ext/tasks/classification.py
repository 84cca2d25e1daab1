"""Classification: cross-entropy (or another loss) on (inputs, labels)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._modes import evaluating
from ..errors import InputError
from .base import Task

__all__ = ["Classification"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Classification(Task):
    """Batches are ``(inputs, labels)`` or dicts with ``pixel_values`` and ``labels``, as transformers has them.

    Args:
        loss: ``loss(logits, labels) -> per-sample losses [N]``; cross-entropy by default. Logits are [N, classes]
            and the model may return an object with ``.logits``.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor] | None = None):
        self.loss = loss
        self._classes: int | None = None  # of the model's output

    def inputs(self, batch: Any) -> Tensor:
        return self._split(batch)[0]

    def labels(self, batch: Any) -> Tensor:
        return self._split(batch)[1]

    def begin(self, model: nn.Module, batch: Any) -> None:
        """Learns the number of classes from one forward pass, so that :meth:`check` can check every label."""
        self._classes = None
        inputs, _ = self.prepare(batch, next(model.parameters()).device)
        with evaluating(model), torch.no_grad():
            logits = self.logits(model, inputs)
        if self.loss is None:  # else it knows what it takes
            _check_logits(logits)
        if isinstance(logits, Tensor) and logits.dim() == 2:
            self._classes = logits.shape[1]

    def check(self, batch: Any) -> None:
        inputs, labels = self._split(batch)
        if inputs.shape[:1] != labels.shape[:1]:
            raise InputError(f"a batch has {inputs.shape[0]} inputs and {labels.shape[0]} labels: they must match")
        if inputs.shape[0] == 0:
            raise InputError("a batch is empty: drop it, or set drop_last=True on its loader")
        if self.loss is not None:  # it knows what its labels mean
            return
        if not are_indices(labels):
            raise InputError(
                f"labels: expected integers of shape [N], got {labels.dtype} of shape {list(labels.shape)}"
            )
        # Only on the CPU, where a loader leaves them: looking at labels on a device would wait for it.
        if self._classes is not None and labels.device.type == "cpu":
            _check_range(labels, self._classes)

    def prepare(self, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        self.check(batch)
        inputs, labels = self._split(batch)
        if are_indices(labels):
            labels = labels.long()
        return inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def logits(self, model: Any, inputs: Tensor) -> Tensor:
        output = model(inputs)
        return getattr(output, "logits", output)

    def losses(self, model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        logits = self.logits(model, inputs)
        if self.loss is None:
            _check_logits(logits)
            # In float32 or wider: a loss rounded to 8 bits would spoil the adaptive weights made from it.
            wide = logits if logits.dtype == torch.float64 else logits.float()
            return F.cross_entropy(wide, labels, reduction="none")
        losses = self.loss(logits, labels)
        if losses.shape != (inputs.shape[0],):
            raise InputError(
                f"the loss returned shape {list(losses.shape)} for {inputs.shape[0]} samples: return one number per "
                'sample (reduction="none")'
            )
        return losses

    @staticmethod
    def _split(batch: Any) -> tuple[Tensor, Tensor]:
        pair: tuple[Any, ...] = ()
        if isinstance(batch, Mapping):
            pair = (batch.get("pixel_values"), batch.get("labels"))
        elif isinstance(batch, (tuple, list)):
            pair = tuple(batch)
        if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
            got = f"a dict of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
            raise InputError(
                f"a batch is (inputs, labels) or a dict with pixel_values and labels, all tensors; got {got}"
            )
        return pair


def are_indices(labels: Tensor) -> bool:
    return labels.dtype in _INTEGERS and labels.dim() == 1


def _check_logits(logits: Any) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise InputError(
            f"the model's output: expected logits [N, classes] or an object with .logits, got {got}: wrap the model, "
            "or give Classification a loss that takes its output"
        )


def _check_range(labels: Tensor, classes: int) -> None:
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < classes:
            raise InputError(
                f"label {label} is outside the model's {classes} classes (0 to {classes - 1}): check the labels or the "
                "model"
            )
