"""Descent on what is kept with ascent on what is forgotten, in one step; plain, and with the conflict taken out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .forgetting import Forgetting
from .row import Row
from .values import ForgetLoss

__all__ = ["NegativeGradientPlus", "Projected"]


@dataclass(kw_only=True)
class NegativeGradientPlus(Forgetting):
    r"""NegGrad+: joint descent of :math:`L_r - \alpha L_f`. The default α is a choice of this package."""

    name: ClassVar[str] = "negative_gradient_plus"
    row: ClassVar[Row] = Row(
        saliency="every weight",
        forget_term="−α mean loss",
        retain_term="mean loss",
        geometry="joint: both gradients at the same weights",
        source="NegGrad+ in arXiv 2302.09880",
    )
    ascends: ClassVar[bool] = True

    forget_alpha: float | str = 0.1
    update: str = "joint"

    def forget_loss(self, losses: Tensor, iteration: int) -> ForgetLoss:
        return self.ascent(losses, iteration)


@dataclass(kw_only=True)
class Projected(NegativeGradientPlus):
    r"""NegGrad+ whose forget gradient loses what it has against the retain gradient.

    With g_f the gradient of :math:`-\alpha L_f`, clipped, and g_r that of :math:`L_r`: where
    :math:`\langle g_f, g_r \rangle < 0` the step takes
    :math:`g_f - \frac{\langle g_f, g_r \rangle}{\|g_r\|^2} g_r + g_r`, otherwise :math:`g_f + g_r`. The products come
    with the norms, so that no pass over memory is added. Source: PCGrad, arXiv 2001.06782, of the one gradient.
    """

    name: ClassVar[str] = "projected"
    row: ClassVar[Row] = Row(
        saliency="every weight",
        forget_term="−α mean loss",
        retain_term="mean loss",
        geometry="joint; g_f − ⟨g_f, g_r⟩ / ‖g_r‖² g_r where ⟨g_f, g_r⟩ < 0",
        source="arXiv 2001.06782",
    )

    forget_alpha: float | str = 1.0
    max_norm: float | None = 1.0
    project: bool = True
