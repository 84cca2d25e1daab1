"""Wrong labels for what is to be forgotten: on every weight, or on those that its gradients point at (SalUn)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..errors import InputError
from .forgetting import Forgetting
from .row import Row
from .values import Default, ForgetLoss

__all__ = ["RandomLabel", "SalUn"]

# An epoch is a pass over both sets, whatever their sizes.
_CIFAR10 = {"rule": "momentum", "momentum": 0.9, "weight_decay": 5e-4, "epochs": 10, "forget_freq": None}


@dataclass(kw_only=True)
class RandomLabel(Forgetting):
    """Descent on the forget set under what shall stand in its place: a wrong label for each sample, drawn once, or the
    prediction for another condition (:meth:`~unlearn_ext.tasks.Task.replacement_losses`).

    Args:
        forget_freq: as in :class:`Method`; None: forget steps so spread that a pass over the forget set takes as long
            as one over the retain set, or every iteration where the forget set has as many batches or more; both
            loaders then need a length.
    """

    name: ClassVar[str] = "random_label"
    row: ClassVar[Row] = Row(
        saliency="every weight",
        forget_term="α mean loss under wrong labels; diffusion: another condition's prediction",
        retain_term="mean loss",
        geometry="forget and retain steps in turn",
        source="RL in arXiv 2409.19732",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {"cifar10-resnet18": {**_CIFAR10, "lr": 0.003}}

    forget_freq: int | None = 1

    def __post_init__(self) -> None:
        given = self.forget_freq
        self.forget_freq = 1 if given is None else given  # what numbers have to be, None need not
        super().__post_init__()
        self.forget_freq = given
        self._batches = (1, 1)  # forget and retain iterations of a pass

    def begin(self, passes: Mapping[str, int | None]) -> None:
        super().begin(passes)
        if self.forget_freq is None:
            for name in ("forget", "retain"):
                if passes.get(name) is None:
                    raise InputError(
                        f"forget_freq=None spreads forget steps over a pass, and the {name} set's loader has no "
                        "length: pass one that has, or give forget_freq a number"
                    )
            self._batches = passes["forget"], passes["retain"]

    def forgets_at(self, iteration: int) -> bool:
        if self.forget_freq is not None:
            return super().forgets_at(iteration)
        forget, retain = self._batches
        return iteration * forget % retain < forget  # of any `retain` iterations in a row, `forget` of them

    @property
    def replaces(self) -> bool:
        return True

    def forget_loss(self, losses: Tensor, iteration: int) -> ForgetLoss:
        return ForgetLoss(self.strength(iteration) * losses.mean())


@dataclass(kw_only=True)
class SalUn(RandomLabel):
    r"""SalUn: :class:`RandomLabel` where every update, retain steps too, moves only the weights whose summed forget
    gradient :math:`|\sum_b \nabla \bar l_b|` is among the largest.

    Unlike in the released code, momentum and decay do not move the others either (``protect``): the result says that
    none has moved. Source: arXiv 2310.12508.

    Args:
        mask_fraction: of all weights, that may be moved, 0.5 unless a ``mask`` is given.
    """

    name: ClassVar[str] = "salun"
    row: ClassVar[Row] = Row(
        saliency="top fraction by abs(Σ forget gradients), in every step",
        forget_term="as random_label",
        retain_term="mean loss",
        geometry="forget and retain steps in turn; no other weight moves",
        source="arXiv 2310.12508",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar10-resnet18": {**_CIFAR10, "lr": 0.013, "mask_fraction": 0.5},
        # As SFR-on's authors ran it.
        "cifar10-resnet18-sfron": {**_CIFAR10, "lr": 0.007, "mask_fraction": 0.2},
        # Batches say with replace_labels that class c + 1 stands in the place of class c.
        "ddpm-cifar10": {
            "rule": "adam",
            "lr": 1e-5,
            "iterations": 1000,
            "update": "joint",
            "retain_weight": 1e-3,
            "mask_fraction": 0.5,
        },
    }

    mask_fraction: float | None = Default(0.5)
    mask_scope: str = "all"
    protect: bool = True

    @property
    def measures(self) -> str | None:
        return "gradient" if self.mask is None and self.mask_fraction is not None else None
