"""Checks of the pure-PyTorch operators; csrc/tensors/operands.cpp holds the native ones, with the same words."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .layout import SCALARS

WEIGHTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STATE = (torch.float32, torch.float64)


def fail(op: str, argument: str, expected: str, got: str) -> NoReturn:
    raise RuntimeError(f"{op}: {argument}: expected {expected}, got {got}")


def _check_length(
    op: str, argument: str, tensors: Sequence[Tensor], name: str, reference: Sequence[Tensor], may_be_absent: bool
) -> None:
    if len(tensors) != len(reference) and (tensors or not may_be_absent):
        or_none = " or none" if may_be_absent else ""
        expected = f"{len(reference)} tensors (one for each of {name}){or_none}"
        fail(op, argument, expected, str(len(tensors)))


def _check_devices(op: str, argument: str, tensors: Sequence[Tensor], name: str, reference: Sequence[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        if tensor.device != reference[0].device:
            fail(op, f"{argument}[{i}]", f"device {reference[0].device} as {name}[0] has", f"{tensor.device}")


def check_list(
    op: str,
    argument: str,
    tensors: Sequence[Tensor],
    name: str,
    reference: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    may_be_absent: bool = True,
) -> None:
    """One tensor of equal shape and an allowed dtype for each of the reference list."""
    _check_length(op, argument, tensors, name, reference, may_be_absent)
    for i, tensor in enumerate(tensors):
        if tensor.shape != reference[i].shape:
            expected = f"shape {list(reference[i].shape)} as {name} has"
            fail(op, f"{argument}[{i}]", expected, f"{list(tensor.shape)}")
        if tensor.dtype not in dtypes:
            fail(op, f"{argument}[{i}]", f"dtype {' or '.join(map(str, dtypes))}", f"{tensor.dtype}")
    _check_devices(op, argument, tensors, name, reference)


def check_state(op: str, argument: str, tensors: Sequence[Tensor], weights: Sequence[Tensor], required: bool) -> None:
    """Moments and slow weights: float64 for float64 weights, float32 for all others."""
    check_list(op, argument, tensors, "weights", weights, STATE, may_be_absent=not required)
    for i, tensor in enumerate(tensors):
        expected = torch.float64 if weights[i].dtype == torch.float64 else torch.float32
        if tensor.dtype != expected:
            fail(op, f"{argument}[{i}]", f"dtype {expected}", f"{tensor.dtype}")


def check_bits(
    op: str, bits: Sequence[Tensor], name: str, reference: Sequence[Tensor], may_be_absent: bool = True
) -> None:
    _check_length(op, "bits", bits, name, reference, may_be_absent)
    for i, word in enumerate(bits):
        shape = ((reference[i].numel() + 31) // 32,)
        if word.dtype != torch.int32 or word.shape != shape or not word.is_contiguous():
            expected = f"contiguous words of dtype torch.int32 and shape {list(shape)}"
            fail(op, f"bits[{i}]", expected, f"{word.dtype} and shape {list(word.shape)}")
    _check_devices(op, "bits", bits, name, reference)


def check_scalars(op: str, scalars: Tensor) -> dict[str, float]:
    if scalars.dtype != torch.float64 or scalars.numel() != len(SCALARS):
        expected = f"a float64 tensor of {len(SCALARS)} numbers as ops.scalars() makes it"
        fail(op, "scalars", expected, f"{scalars.dtype} of shape {list(scalars.shape)}")
    return dict(zip(SCALARS, scalars.tolist(), strict=True))


def check_writable(op: str, **lists: Sequence[Tensor]) -> None:
    """No two of the tensors that will be written may overlap, from their first to their last element."""
    ranges = []
    for argument, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if tensor.numel() == 0:
                continue
            reach, overlaps = 0, False
            dims = sorted(pair for pair in zip(tensor.stride(), tensor.shape, strict=True) if pair[1] > 1)
            for stride, size in dims:
                overlaps |= stride <= reach
                reach += stride * (size - 1)
            if overlaps:
                expected = "a tensor whose elements do not share memory"
                fail(op, f"{argument}[{i}]", expected, "an expanded or overlapping view")
            begin = tensor.data_ptr()
            ranges.append((begin, begin + (reach + 1) * tensor.element_size(), f"{argument}[{i}]"))
    ranges.sort()
    for (_, end, name), (begin, _, other) in itertools.pairwise(ranges):
        if begin < end:
            fail(op, other, "memory of its own", f"a range of memory that overlaps {name}")
