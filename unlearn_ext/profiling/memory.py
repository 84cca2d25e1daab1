"""The memory that the weight work of an iteration takes: predicted from shapes, and measured."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import InputError
from ..optim import UnlearnOptimizer
from ..saliency import SaliencyMask
from .shapes import Shape, count
from .tensors import BETAS, DECAY, EPS, MAX_NORM, MOMENTUM, RATES, SLOW_RATE

__all__ = ["available", "check_room", "measured", "predicted"]


def predicted(shapes: Sequence[Shape], rule: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each kind of tensor. All of them live at once, so the peak is their sum."""
    total, width = count(shapes), dtype.itemsize
    moments = {"sgd": 0, "momentum": 1}.get(rule, 2)
    return {
        "weights": width * total,
        "one gradient": width * total,
        "moments": 4 * moments * total,
        "slow weights": 4 * total,
        "mask bits": sum(4 * -(-count([shape]) // 32) for shape in shapes),
    }


def check_room(shapes: Sequence[Shape], rule: str, dtype: torch.dtype, device: torch.device) -> None:
    """Whether the tensors of an iteration fit the memory that is free; nothing is allocated to find out.

    Raises:
        InputError: they do not.
    """
    sizes, room = predicted(shapes, rule, dtype), available(device)
    needed = sum(sizes.values()) + sizes["one gradient"]  # the other side's
    if room is not None and needed > room:
        raise InputError(
            f"{count(shapes):.3g} weights need {needed / 1e9:.3g} GB for the update and {room / 1e9:.3g} GB are free: "
            "measure fewer with --weights"
        )


def available(device: torch.device) -> int | None:
    """Bytes that can be allocated without swapping; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        line = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(line.group(1)) if line else None


def measured(shapes: Sequence[Shape], rule: str, dtype: torch.dtype, device: torch.device) -> int | None:
    """Bytes by which the peak grows while weights, gradients and an optimizer are made and one iteration runs: of
    PyTorch's allocator on CUDA, of the process's resident set on Linux. None where neither can be asked."""
    _iterate([(64,)], rule, dtype, device)  # what is loaded on first use is no memory of the update
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _iterate(shapes, rule, dtype, device)
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError, AttributeError):  # memory freed earlier would be taken again unseen; glibc only
        ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS") if _forget_peak() else None
    if before is None:
        return None
    _iterate(shapes, rule, dtype, device)
    peak = _resident("VmHWM")
    return None if peak is None else peak - before


def _iterate(shapes: Sequence[Shape], rule: str, dtype: torch.dtype, device: torch.device) -> None:
    """As in training: one gradient at a time, and the optimizer makes its own state. No number is 0, because a page of
    zeros that nobody wrote is not resident."""
    weights = {
        f"weight {i}": torch.full(shape, 0.02, dtype=dtype, device=device).requires_grad_()
        for i, shape in enumerate(shapes)
    }
    for w in weights.values():
        w.grad = torch.full_like(w, 0.01)
    optimizer = UnlearnOptimizer(
        list(weights.items()),
        rule=rule,
        lr=RATES[rule],
        momentum=MOMENTUM if rule == "momentum" else 0.0,
        betas=BETAS,
        eps=EPS,
        weight_decay=DECAY,
        max_norm=MAX_NORM,
        slow_rate=SLOW_RATE,
        mask=SaliencyMask.from_dict({name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}),
    )
    optimizer.forget_step()
    optimizer.retain_step()


# --- The kernel's account of this process -------------------------------------------------------------------


def _forget_peak() -> bool:
    """Lets the peak of the resident set start from what is resident now; false where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> int | None:
    try:
        line = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(line.group(1)) if line else None
