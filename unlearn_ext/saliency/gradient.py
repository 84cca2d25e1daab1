"""GradientSum: the sum of the forget gradients, by whose size SalUn ranks weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .fisher import FisherDiagonal

if TYPE_CHECKING:
    from ..tasks import Task

__all__ = ["GradientSum"]


class GradientSum(FisherDiagonal):
    r"""The sum over batches of the gradient of the batch-mean loss, :math:`\sum_b \nabla \bar l_b`, in eval mode.

    It streams as :class:`FisherDiagonal` does, over whole sets and without clipping, and ``sums`` holds signed sums.
    Source: SalUn, arXiv 2310.12508.
    """

    _NAME, _NUMBER = "Saliency", "a sum of gradients"

    def __init__(self, model: nn.Module, task: Task, *, split_batches: bool = True, in_backward: bool = False):
        super().__init__(model, task, split_batches=split_batches, in_backward=in_backward)

    @staticmethod
    def _add(sums: Sequence[Tensor], gradients: Sequence[Tensor], weight: float) -> None:
        for total, gradient in zip(sums, gradients, strict=True):
            total.add_(gradient)  # weights are of clipping, and there is none
