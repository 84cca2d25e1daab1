"""Classification: cross-entropy (or another loss) on (inputs, labels)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..distributed.batches import map_tensors
from ..distributed.hashing import sample_numbers
from ..distributed.modes import measuring
from ..errors import InputError, NonFiniteError
from ..utils.arguments import check_seed, describe
from .base import Task, check_per_sample
from .batches import INTEGERS, LABEL_KEYS, REPLACEMENT, Inputs, by_name, check_values, label_key, refusing, split

__all__ = ["Classification"]


class Classification(Task):
    """Batches are ``(inputs, labels)``, or dicts of the model's keyword arguments with ``labels`` or ``label``, as
    transformers has them (``pixel_values``, or ``input_ids`` and ``attention_mask``): the model gets all but the
    labels. The inputs of a pair may also be such a dict.

    What stands in a forgotten sample's place is a wrong label: that of ``replace_labels`` where a batch is a dict and
    has them, otherwise one drawn for the sample once, evenly among the other classes, from the seed and the sample's
    bytes, padding that ``attention_mask`` leaves out not counted: whatever the order, the batch and the rank. Samples
    that are augmented anew in every pass need ``replace_labels``.

    Args:
        loss: ``loss(logits, labels) -> per-sample losses [N]``; cross-entropy by default. Logits are [N, classes],
            and the model may return an object or a dict that has them as ``logits``.
        seed: of the wrong labels.
        label_key: where dicts have their labels; by default under ``labels`` or ``label``.
    """

    kind = "classification"

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        seed: int = 0,
        label_key: str | None = None,
    ):
        if loss is not None and (not callable(loss) or isinstance(loss, type)):
            raise InputError(f"loss: expected a function loss(logits, labels), got {describe(loss)}")
        if label_key is not None and not isinstance(label_key, str):
            raise InputError(f"label_key: expected a name, got {describe(label_key)}")
        self.loss, self.seed = loss, check_seed("seed", seed)
        self._label_keys = LABEL_KEYS if label_key is None else (label_key,)
        # Of the model, since begin():
        self._classes: int | None = None
        self._by_name = True  # whether it takes a dict's inputs by their names

    def inputs(self, batch: Any) -> Inputs:
        return self._split(batch)[0]

    def labels(self, batch: Any) -> Tensor:
        return self._split(batch)[1]

    def begin(self, model: nn.Module, batch: Any) -> None:
        """Learns the number of classes from one forward pass, so that :meth:`check` can check every label."""
        self._classes = None
        inputs, labels = self._split(self.prepare(batch, next(model.parameters()).device))
        if isinstance(inputs, dict):
            self._by_name = by_name(model, inputs)
        with measuring(model), torch.no_grad(), refusing(model, inputs):
            logits = self.logits(model, inputs)
        if self.loss is None:  # else it knows what it takes
            _check_logits(logits)
            if logits.shape[0] != labels.shape[0]:
                raise InputError(
                    f"the model's output: expected {labels.shape[0]} rows of logits, one for each sample of a batch, "
                    f"got shape {list(logits.shape)}"
                )
        if isinstance(logits, Tensor) and logits.dim() == 2:
            self._classes = logits.shape[1]

    def check(self, batch: Any) -> None:
        inputs, labels = self._split(batch)
        check_values(inputs, labels)
        if self.loss is not None:  # it knows what its labels mean
            return
        if not are_indices(labels):
            raise InputError(
                f"labels: expected integers of shape [N], got {labels.dtype} of shape {list(labels.shape)}"
                f"{_label_remedy(labels)}"
            )
        replace = _replace_labels(batch)
        if replace is not None and not isinstance(replace, Tensor):
            raise InputError(f"replace_labels: expected a tensor of integers, got {describe(replace)}")
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

    def prepare(self, batch: Any, device: torch.device) -> tuple[Inputs, Tensor] | dict[str, Tensor]:
        self.check(batch)
        inputs, labels = map_tensors(self._split(batch), lambda part: part.to(device, non_blocking=True))
        if are_indices(labels):
            labels = labels.long()
        replace = _replace_labels(batch)
        if replace is None:
            return inputs, labels
        named = inputs if isinstance(inputs, dict) else {"pixel_values": inputs}
        replace = replace.to(device, non_blocking=True).long()
        return {**named, label_key(batch, self._label_keys): labels, REPLACEMENT: replace}

    def logits(self, model: Any, inputs: Inputs) -> Tensor:
        """What the model gives for the inputs of a prepared batch."""
        if isinstance(inputs, Tensor):
            output = model(inputs)
        elif by_name(model, inputs) if isinstance(model, nn.Module) else self._by_name:
            output = model(**inputs)
        else:
            output = model(*inputs.values())
        if isinstance(output, Mapping) and "logits" in output:
            return output["logits"]
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
        for output in (logits, target):
            _check_logits(output, "choose a method that compares no outputs of two networks")
        if logits.shape != target.shape:
            raise InputError(
                f"the network to compare with gives logits of shape {list(target.shape)} and the model "
                f"{list(logits.shape)}: both need the same classes"
            )
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
        check_per_sample(losses, len(labels))
        return losses

    def _split(self, batch: Any) -> tuple[Inputs, Tensor]:
        return split(batch, self._label_keys)


def _replace_labels(batch: Any) -> Tensor | None:
    return batch.get(REPLACEMENT) if isinstance(batch, Mapping) else None


def _wide(logits: Tensor) -> Tensor:
    """In float32 or wider: a loss rounded to 8 bits would spoil the adaptive weights made from it."""
    return logits if logits.dtype == torch.float64 else logits.float()


def are_indices(labels: Tensor) -> bool:
    return labels.dtype in INTEGERS and labels.dim() == 1


def _label_remedy(labels: Tensor) -> str:
    if labels.dim() == 2 and labels.shape[1] == 1:
        return ": use labels.squeeze(1)" + (".long()" if labels.dtype not in INTEGERS else "")
    if labels.dim() == 2:
        return ": use labels.argmax(1) of one-hot labels, or give Classification a loss that takes them"
    return ": use labels.long()" if labels.dim() == 1 else ""


def _check_logits(logits: Any, other: str = "give Classification a loss that takes its output") -> None:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point():
        got = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        got += f" of {logits.dtype}" if isinstance(logits, Tensor) and not logits.is_floating_point() else ""
        raise InputError(
            f"the model's output: expected logits [N, classes] or an object with .logits, got {got}: wrap the model, "
            f"or {other}"
        )


def _check_range(labels: Tensor, classes: int) -> None:
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < classes:
            raise InputError(
                f"label {label} is outside the model's {classes} classes (0 to {classes - 1}): check the labels or the "
                "model"
            )
