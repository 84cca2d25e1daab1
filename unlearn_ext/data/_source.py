"""What folders of pictures and array files have in common: where the samples of a data set come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["HASHED_BYTES", "Source", "Unreadable", "as_pixels", "known_classes"]

HASHED_BYTES = 256 << 20  # of content that goes into a hash; beyond it, an even sample


class Source(Protocol):
    """Where raw samples come from."""

    labels: Tensor

    def read(self, index: int, keep: bool = False) -> dict[str, Tensor]:
        """The sample's tensors, float32; ``keep`` what was decoded for the next time."""

    def name(self, index: int) -> str: ...

    def held_bytes(self, count: int) -> int:
        """In memory, once ``count`` samples have been read and kept."""

    def digest(self, update: Callable[[bytes], None]) -> str:
        """Feeds what identifies the data and says in words what that is."""


class Unreadable(Exception):
    """A picture that cannot be decoded, and why."""


def as_pixels(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], to the bit what torchvision's ToTensor and Normalize(0.5, 0.5) give."""
    return pixels.to(torch.float32).div_(255).sub_(0.5).div_(0.5)


def known_classes(classes: int) -> str:
    return f"the model has {classes} classes (0 to {classes - 1})"
