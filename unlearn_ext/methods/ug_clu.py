"""UG-CLU: SFR-on that learns new data while it forgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..utils.arguments import check_finite
from .row import Row
from .sfron import SFRon

__all__ = ["UGCLU"]


@dataclass(kw_only=True)
class UGCLU(SFRon):
    r"""UG-CLU, arXiv 2505.15178: :class:`SFRon` whose retain steps descend :math:`p_R L_r + p_L L_l`, L_l being the
    mean loss on a batch of new data (``run(learn=...)``).

    Read in its abstract: the shares are choices of this package.

    Args:
        retain_share: p_R.
        learn_share: p_L.
    """

    name: ClassVar[str] = "ug_clu"
    row: ClassVar[Row] = Row(
        saliency="as sfron",
        forget_term="as sfron",
        retain_term="p_R mean loss + p_L mean loss on new data",
        geometry="as sfron",
        source="arXiv 2505.15178",
    )
    learns: ClassVar[bool] = True
    presets: ClassVar[dict] = {}

    retain_share: float = 0.5
    learn_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite("retain_share", self.retain_share)
        check_finite("learn_share", self.learn_share)

    def retain_loss(self, losses: Tensor, iteration: int) -> Tensor:
        return self.retain_share * losses.mean()

    def learn_loss(self, losses: Tensor, iteration: int) -> Tensor:
        return self.learn_share * losses.mean()
