"""Normal numbers that nobody can draw again."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["system_normals"]


def system_normals(shape: Sequence[int]) -> Tensor:
    """Standard normal float64 numbers, each from 52 bits of the system's randomness through the inverse distribution.

    A generator of torch or NumPy would not do: what torch's draws on the CPU follows from 32 bits of its seed, and
    those can all be tried.
    """
    count = math.prod(shape)
    words = np.frombuffer(secrets.token_bytes(8 * count), dtype=np.uint64) >> np.uint64(12)
    # The midpoints of 2**52 equal parts: exact in float64, and neither 0 nor 1.
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-52
    return torch.special.ndtri(torch.from_numpy(uniform)).reshape(tuple(shape))
