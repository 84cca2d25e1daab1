"""ESD: a denoiser's prediction for a concept, turned away from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..utils.arguments import check_finite
from .forgetting import Forgetting
from .row import DIFFUSION, Row
from .values import ForgetLoss

__all__ = ["ESD"]


@dataclass(kw_only=True)
class ESD(Forgetting):
    r"""ESD, arXiv 2303.07345: descent of the squared error of :math:`\epsilon(c)` towards
    :math:`\epsilon_0(c') - \eta (\epsilon_0(c) - \epsilon_0(\varnothing))`, ε_0 being the original network, c what is
    forgotten and c' what stands in its place (``replace_labels``, ``replace_prompts``), or c itself.

    Noisy samples are made from the forget set's images; the released code lets the network denoise noise of its own up
    to the timestep. The null condition must be known: see ``null_label`` and ``null_embeds`` of the tasks. ESD-x trains
    the cross-attention weights and ESD-u the others: freeze the rest
    (:func:`unlearn_ext.models.weights.select_trained`).

    Args:
        negative_guidance: η.
    """

    name: ClassVar[str] = "esd"
    row: ClassVar[Row] = Row(
        saliency="every weight; cross-attention (x) or the rest (u) where the others are frozen",
        forget_term="squared error of ε(c) to ε₀(c') − η (ε₀(c) − ε₀(∅))",
        retain_term="none",
        geometry="forget steps alone",
        source="arXiv 2303.07345",
        tasks=DIFFUSION,
        otherwise="its target is made of noise predictions under a condition and under none",
    )
    retains: ClassVar[bool] = False
    forget_teacher: ClassVar[str | None] = "original"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "sd-1-4": {"rule": "adam", "lr": 5e-5, "iterations": 200, "negative_guidance": 2.0},
    }

    rule: str = "adam"
    lr: float = 5e-5
    iterations: int = 200
    negative_guidance: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite("negative_guidance", self.negative_guidance)

    def distance_settings(self, side: str) -> dict[str, Any]:
        return {"negative_guidance": self.negative_guidance}

    def forget_loss(self, losses: Tensor, iteration: int, distances: Tensor) -> ForgetLoss:
        return ForgetLoss(self.strength(iteration) * distances.mean())
