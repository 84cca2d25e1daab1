"""Features of norm 1, each sample's by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from ..utils.arguments import check_finite

if TYPE_CHECKING:
    import numpy as np

__all__ = ["unit_rows"]


def unit_rows(rows: Tensor | np.ndarray, bias: float = 0.3) -> Tensor:
    r"""Each row less its mean, at norm 1, with a bias entry: :math:`(\hat x, b) / \sqrt{1 + b^2}`, again of norm 1.

    No row depends on another one. A scale or a mean measured over a data set would carry a deleted sample into the
    features of all others, and from there into the retrained model that the guarantee compares with.

    Args:
        rows: ``[n, d]``, a tensor or an array of any floating or integer dtype. A constant row has no direction: zeros
            stand in its place.
        bias: b, from 0.

    Returns:
        float64 ``[n, d + 1]``.

    Raises:
        InputError: not a matrix, or not finite.
    """
    check_finite("bias", bias)
    rows = rows if isinstance(rows, Tensor) else torch.as_tensor(rows, device="cpu")
    if rows.dim() != 2 or not rows.shape[1]:
        raise InputError(f"rows: expected a matrix [samples, features], got shape {list(rows.shape)}")
    rows = rows.to(torch.float64)
    if not bool(torch.isfinite(rows).all()):
        raise InputError("rows: expected finite numbers, got inf or NaN: clean the data first")
    largest = rows.abs().amax(dim=1, keepdim=True)  # squares of very small or large rows would leave float64's range
    rows = torch.where(largest > 0, rows / largest, 0.0)
    rows = rows - rows.mean(dim=1, keepdim=True)
    norms = rows.norm(dim=1, keepdim=True)
    constant = norms <= 4.0 * rows.shape[1] * torch.finfo(torch.float64).eps  # what is left of it is rounding
    rows = torch.where(constant, 0.0, rows / norms)
    return torch.cat((rows, rows.new_full((len(rows), 1), float(bias))), dim=1) / (1.0 + float(bias) ** 2) ** 0.5
