"""Where and in which precision a command computes."""

from __future__ import annotations

from enum import Enum

__all__ = ["Precision", "checked_device"]


class Precision(str, Enum):
    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


def checked_device(name: str) -> str:
    """The name of a device that is there.

    Raises:
        InputError: it is not, or it is neither a CPU nor a GPU.
    """
    import torch

    from ..errors import InputError

    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this torch sees no GPU; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise InputError(f"--device {name}: expected an index below {count}, the number of GPUs that torch sees")
    return name
