"""The pictures in a grid that a run of ``unlearn-ext forget`` writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

__all__ = ["GAP", "SIDE", "cells", "far"]

SIDE, GAP = 48, 2  # of a picture in the grid, and between pictures: 16 pixels are shown as 48


def cells(path: Path, rows: int, columns: int) -> np.ndarray:
    """uint8 [rows, columns, 16, 16, 3] of a grid: pictures lie at its lower right, each pixel three times as large."""
    from PIL import Image

    canvas = np.asarray(Image.open(path).convert("RGB"))
    lower = canvas[canvas.shape[0] - rows * (SIDE + GAP) :, canvas.shape[1] - columns * (SIDE + GAP) :]
    found = lower.reshape(rows, SIDE + GAP, columns, SIDE + GAP, 3).swapaxes(1, 2)
    assert (found[:, :, SIDE:] == 255).all() and (found[:, :, :, SIDE:] == 255).all()  # white between them
    small = found[:, :, :SIDE:3, :SIDE:3]
    assert (found[:, :, :SIDE, :SIDE] == small.repeat(3, axis=2).repeat(3, axis=3)).all()
    return small


def far(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference of two pictures, in steps of 255."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())
