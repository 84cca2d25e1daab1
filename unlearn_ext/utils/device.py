"""The name of a device, for results."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

__all__ = ["device_name"]


def device_name(device: torch.device | str = "cpu") -> str:
    """What the numbers were measured on, as its maker calls it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
