"""GradientSum: the sum of the forget gradients, by whose size SalUn ranks weights."""

from __future__ import annotations

from torch import Tensor

from .fisher import FisherDiagonal

__all__ = ["GradientSum"]


class GradientSum(FisherDiagonal):
    r"""The sum over batches of the gradient of the batch-mean loss, :math:`\sum_b \nabla \bar l_b`, in eval mode.

    It streams as :class:`FisherDiagonal` does, and ``sums`` holds signed sums. Source: SalUn, arXiv 2310.12508.
    """

    _NAME, _NUMBER = "Saliency", "a sum of gradients"

    @staticmethod
    def _add(sums: list[Tensor], gradients: list[Tensor], weight: float) -> None:
        for total, gradient in zip(sums, gradients, strict=True):
            total.add_(gradient, alpha=weight**0.5)  # the weight is that of squares
