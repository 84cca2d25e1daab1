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
    from ..utils.arguments import check_device

    return str(check_device(name, "--device", kinds=("cpu", "cuda")))
