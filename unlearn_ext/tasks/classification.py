"""Classification: cross-entropy (or another loss) on (inputs, labels)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._hashing import sample_numbers
from .._modes import evaluating
from ..errors import InputError, NonFiniteError
from .base import Task

__all__ = ["Classification"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Classification(Task):
    """Batches are ``(inputs, labels)`` or dicts with ``pixel_values`` and ``labels``, as transformers has them.

    What stands in a forgotten sample's place is a wrong label: that of ``replace_labels`` where a batch is a dict and
    has them, otherwise one drawn for the sample once, evenly among the other classes, from the seed and the sample's
    bytes: whatever the order, the batch and the rank. Samples that are augmented anew in every pass need
    ``replace_labels``.

    Args:
        loss: ``loss(logits, labels) -> per-sample losses [N]``; cross-entropy by default. Logits are [N, classes]
            and the model may return an object with ``.logits``.
        seed: of the wrong labels.
    """

    kind = "classification"

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor] | None = None, *, seed: int = 0):
        self.loss, self.seed = loss, seed
        self._classes: int | None = None  # of the model's output

    def inputs(self, batch: Any) -> Tensor:
        return self._split(batch)[0]

    def labels(self, batch: Any) -> Tensor:
        return self._split(batch)[1]

    def begin(self, model: nn.Module, batch: Any) -> None:
        """Learns the number of classes from one forward pass, so that :meth:`check` can check every label."""
        self._classes = None
        inputs, _ = self._split(self.prepare(batch, next(model.parameters()).device))
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
        replace = _replace_labels(batch)
        if replace is not None and (not are_indices(replace) or replace.shape != labels.shape):
            raise InputError(
                f"replace_labels: expected integers of shape {list(labels.shape)}, got {replace.dtype} of shape "
                f"{list(replace.shape)}"
            )
        # Only on the CPU, where a loader leaves them: looking at labels on a device would wait for it.
        for own in (labels, replace):
            if own is not None and self._classes is not None and own.device.type == "cpu":
                _check_range(own, self._classes)

    def check_replacement(self, batch: Any) -> None:
        if _replace_labels(batch) is not None:
            return
        if self._classes is None or self._classes < 2 or not are_indices(self.labels(batch)):
            raise InputError(
                "Classification has no replacement for what is forgotten: a wrong label is drawn for labels that are "
                "class indices and a model that gives logits [N, classes] of two classes or more; make batches dicts "
                "with replace_labels"
            )

    def prepare(self, batch: Any, device: torch.device) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        self.check(batch)
        inputs, labels = (part.to(device, non_blocking=True) for part in self._split(batch))
        if are_indices(labels):
            labels = labels.long()
        replace = _replace_labels(batch)
        if replace is None:
            return inputs, labels
        replace = replace.to(device, non_blocking=True).long()
        return {"pixel_values": inputs, "labels": labels, "replace_labels": replace}

    def logits(self, model: Any, inputs: Tensor) -> Tensor:
        output = model(inputs)
        return getattr(output, "logits", output)

    def losses(self, model: Any, batch: Any) -> Tensor:
        inputs, labels = self._split(batch)
        return self._losses_of(self.logits(model, inputs), labels)

    def replacement_losses(self, model: Any, batch: Any) -> Tensor:
        """The loss of each sample under its wrong label."""
        self.check_replacement(batch)
        inputs, labels = self._split(batch)
        wrong = _replace_labels(batch)
        if wrong is None:
            drawn = (sample_numbers(inputs, self.seed) >> 33) & 0x3FFFFFFF  # the sum's best bits, not negative
            wrong = (labels + 1 + drawn % (self._classes - 1)) % self._classes
        return self._losses_of(self.logits(model, inputs), wrong)

    def losses_and_distances(
        self, model: Any, teacher: nn.Module, batch: Any, *, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        r"""Distances are :math:`T^2 \mathrm{KL}(\mathrm{softmax}(z_0 / T) \,\|\, \mathrm{softmax}(z / T))` of the
        teacher's logits z_0 and the model's z, in nats."""
        inputs, labels = self._split(batch)
        logits = self.logits(model, inputs)
        with torch.no_grad():
            target = self.logits(teacher, inputs)
        _check_logits(logits)
        own, other = (F.log_softmax(_wide(z) / temperature, dim=1) for z in (logits, target))
        distances = F.kl_div(own, other, reduction="none", log_target=True).sum(1) * temperature**2
        return self._losses_of(logits, labels), distances

    def check_accuracy(self) -> None:
        if self.loss is not None:
            raise InputError(
                "target_accuracy goes with the cross-entropy: leave Classification's loss or target_accuracy out"
            )

    def hits(self, model: Any, batch: Any) -> Tensor:
        inputs, labels = self._split(batch)
        logits = self.logits(model, inputs)
        _check_logits(logits)
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteError("a prediction is not finite: check the data, lower lr")
        return logits.argmax(1) == labels

    def wrong_loss(self) -> float:
        r""":math:`\log C` of C classes: the label of a sample that is got right has a probability of 1/C or more."""
        if self._classes is None or self._classes < 2:
            raise InputError(
                "target_accuracy needs logits [N, classes] of two classes or more: change the model's output, or leave "
                "it out"
            )
        return math.log(self._classes)

    def _losses_of(self, logits: Any, labels: Tensor) -> Tensor:
        if self.loss is None:
            _check_logits(logits)
            return F.cross_entropy(_wide(logits), labels, reduction="none")
        losses = self.loss(logits, labels)
        if losses.shape != labels.shape[:1]:
            raise InputError(
                f"the loss returned shape {list(losses.shape)} for {labels.shape[0]} samples: return one number per "
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


def _replace_labels(batch: Any) -> Tensor | None:
    return batch.get("replace_labels") if isinstance(batch, Mapping) else None


def _wide(logits: Tensor) -> Tensor:
    """In float32 or wider: a loss rounded to 8 bits would spoil the adaptive weights made from it."""
    return logits if logits.dtype == torch.float64 else logits.float()


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
