"""Labelled batches as loaders give them: pairs, and dicts of a model's keyword arguments with their labels."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.wrappers import unwrapped
from ..errors import InputError, first_line, is_out_of_memory
from ..utils.arguments import describe, is_dense

__all__ = ["INTEGERS", "LABEL_KEYS", "REPLACEMENT", "Inputs", "by_name", "check_values", "holds_integers", "label_key"]
__all__ += ["refusing", "split"]

Inputs = Tensor | dict[str, Tensor]  # one for the model's first argument, or keyword arguments by name

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LABEL_KEYS = ("labels", "label")
REPLACEMENT = "replace_labels"
_FORM = "a batch is (inputs, labels) or a dict of the model's arguments, such as pixel_values and labels, all tensors"


def label_key(batch: Mapping[str, Any], keys: tuple[str, ...] = LABEL_KEYS) -> str:
    """Under which of ``keys`` a dict has its labels.

    Raises:
        InputError: it has none of them, or several.
    """
    found = [key for key in keys if key in batch]
    if not found:
        raise InputError(f"{_FORM}; got {describe(batch)}, without {' or '.join(keys)}")
    if len(found) > 1:
        raise InputError(f"a batch has {' and '.join(found)}: say with label_key which of them the labels are")
    return found[0]


def split(batch: Any, keys: tuple[str, ...] = LABEL_KEYS) -> tuple[Inputs, Tensor]:
    """Inputs and labels of a batch, raw or prepared. ``pixel_values`` alone are the model's first argument, whatever
    its name.

    Raises:
        InputError: it has another form; says what was given.
    """
    if isinstance(batch, Mapping):
        key = label_key(batch, keys)
        inputs = {name: value for name, value in batch.items() if name not in (key, REPLACEMENT)}
        labels = batch[key]
        if set(inputs) == {"pixel_values"}:
            inputs = inputs["pixel_values"]
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, labels = batch
    else:
        raise InputError(f"{_FORM}; got {_described(batch)}")
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
    parts = list(inputs.values()) if isinstance(inputs, dict) else [inputs]
    if not parts or not isinstance(labels, Tensor) or not all(isinstance(part, Tensor) for part in parts):
        raise InputError(f"{_FORM}; got {_described(batch)}{_remedy(parts, labels)}")
    return inputs, labels


def _described(batch: Any) -> str:
    """What a batch is: its parts, where it has any."""
    if isinstance(batch, Mapping):
        parts = [f"{name} ({describe(value)})" for name, value in batch.items()]
        return f"a {type(batch).__name__} of {', '.join(parts)}"
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return f"inputs that are {describe(batch[0])} and labels that are {describe(batch[1])}"
    if isinstance(batch, (tuple, list)) and batch:
        parts = "one part" if len(batch) == 1 else f"{len(batch)} parts"
        return f"{parts} ({', '.join(map(describe, batch))}): let collate_fn give these two, or a dict"
    return describe(batch)


def _remedy(parts: list[Any], labels: Any) -> str:
    kinds = {type(value).__module__ for value in [*parts, labels]}
    if "numpy" in kinds:
        return ": convert arrays with torch.from_numpy, or let a DataLoader collate samples"
    if any(isinstance(part, (list, tuple)) and part and all(isinstance(x, str) for x in part) for part in parts):
        return ": tokenize texts, and leave the texts themselves out"
    if isinstance(labels, (list, tuple, int, float)):
        return ": convert labels with torch.tensor"
    return ""


def check_values(inputs: Inputs, labels: Tensor) -> None:
    """Raises InputError for inputs of another number than labels, or that no network of real numbers takes."""
    named = inputs.items() if isinstance(inputs, dict) else [("inputs", inputs)]
    for name, tensor in [*named, ("labels", labels)]:
        if tensor.is_meta:
            raise InputError(f"{name}: {describe(tensor)} has no values")
        if tensor.is_nested:
            raise InputError(f"{name}: expected a dense tensor, got a nested one: call its to_padded_tensor()")
        if tensor.dim() == 0:
            raise InputError(
                f"{name}: expected a first dimension of samples, got {describe(tensor)}: pass a loader that makes "
                "batches (batch_size)"
            )
    for name, tensor in named:
        if tensor.layout != torch.strided:
            raise InputError(f"{name}: expected a dense tensor, got one of {tensor.layout}: call its to_dense()")
        if tensor.is_complex():
            raise InputError(
                f"{name}: expected real numbers, got {describe(tensor)}: pass torch.view_as_real of it, or its abs()"
            )
        if tensor.shape[0] != labels.shape[0]:
            raise InputError(
                f"a batch has {tensor.shape[0]} {name} and {labels.shape[0]} labels: they must match, got "
                f"{describe(tensor)} and {describe(labels)}"
            )
    if labels.shape[0] == 0:
        raise InputError("a batch is empty: drop it, or set drop_last=True on its loader")


def by_name(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether the model takes inputs as keyword arguments. One that it has no such name for is its first argument.

    Raises:
        InputError: there are several, and its forward has no such arguments.
    """
    model = unwrapped(model)
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # compiled code tells nothing
        return True
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return True
    unknown = [name for name in inputs if name not in parameters]
    if not unknown:
        return True
    if len(inputs) == 1:
        return False
    raise InputError(
        f"a batch has {', '.join(unknown)}, which the forward of {type(model).__name__} does not take: leave it out of "
        f"the batches; it takes {', '.join(parameters)}"
    )


@contextlib.contextmanager
def refusing(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Around a forward pass: inputs that do not fit the model become an InputError that says what they are."""
    try:
        yield
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if (sentence := _refusal(model, inputs, error)) is None:
            raise
        raise InputError(sentence) from error


def _refusal(model: nn.Module, inputs: Inputs, error: Exception) -> str | None:
    """What is wrong with inputs whose names, types or shapes a model's forward pass has not taken; None for another
    error."""
    kind = type(unwrapped(model)).__name__
    named = inputs if isinstance(inputs, dict) else {"inputs": inputs}
    if isinstance(error, TypeError):
        if "argument" not in str(error):
            return None
        given = ", ".join(named) if isinstance(inputs, dict) else "the inputs alone"
        return (
            f"{kind} cannot be called with {given} ({first_line(error)}): give batches as dicts of the arguments that "
            "its forward takes, and labels"
        )
    # an embedding's, whose input is too large a number or too long a text
    if isinstance(error, IndexError) and re.search(r"index out of range in self|out of bounds", str(error)):
        given = " and ".join(f"{name} of shape {list(tensor.shape)}{_range(tensor)}" for name, tensor in named.items())
        return (
            f"{kind} does not take {given} ({first_line(error)}): give numbers and lengths below the sizes of its "
            "tables, such as a tokenizer's of the same vocabulary, with truncation"
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    indexes = "'indices'" in str(error)  # of an embedding, which takes no floats, though weights are
    other = [
        f"{name} of {tensor.dtype}"
        for name, tensor in named.items()
        if (tensor.is_floating_point() if indexes else tensor.dtype != dtype)
    ]
    if dtype is not None and other and re.search(r"type|not implemented for '", str(error)):
        return (
            f"{kind}, whose weights are {dtype}, does not take {' and '.join(other)} ({first_line(error)}): convert "
            "the inputs to what it was trained on"
        )
    of_shape = re.search(r"shape|size|[Dd]imension|channels|\dD input", str(error))
    if is_out_of_memory(error) or not (of_shape or isinstance(error, AssertionError)):
        return None
    given = " and ".join(f"{name} of shape {list(tensor.shape)}" for name, tensor in named.items())
    advice = ": give the inputs the shape that it was trained on" if of_shape else ""  # else an assertion of anything
    return f"{kind} does not take {given} ({first_line(error)}){advice}"


def holds_integers(tensor: Tensor) -> bool:
    """Whether it is dense, and has numbers that may be places in a model's tables."""
    return is_dense(tensor) and tensor.numel() > 0 and tensor.dtype in INTEGERS


def _range(tensor: Tensor) -> str:
    return f", from {int(tensor.min())} to {int(tensor.max())}" if holds_integers(tensor) else ""
