"""SFR-on: saliency-masked, adaptively weighted forgetting in the retain geometry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from ..utils.arguments import check_count, check_finite, check_number
from .forgetting import Forgetting
from .row import Row
from .values import Default, ForgetLoss

__all__ = ["ABLATIONS", "SFRon", "adaptive_shares", "adaptive_weights"]


def adaptive_weights(losses: Tensor, lambd: float, eps: float) -> Tensor:
    r"""Each sample's weight in the forget gradient, :math:`c_i = 1 / (\mathrm{detach}(l_i)^\lambda + \epsilon)`.

    Well-remembered samples (small losses) get more. Computed in float32 or wider. Mind eps: a float32
    cross-entropy can be exactly 0, and such a sample's c is 1/eps.
    """
    losses = losses.detach()
    wide = losses if losses.dtype == torch.float64 else losses.float()
    return 1.0 / (wide.clamp_min(0.0) ** lambd + eps)


def adaptive_shares(losses: Tensor, lambd: float, eps: float) -> Tensor:
    r"""Each sample's share, :math:`c_i / \sum c` of :func:`adaptive_weights`; they sum to 1."""
    weights = adaptive_weights(losses, lambd, eps)
    return weights / weights.sum()


# Parts left out: S, the saliency mask; F, the adaptive weights; and on, retain steps from the forgotten weights.
ABLATIONS: dict[str, dict[str, Any]] = {
    "r": {"update": "joint", "lambd": 0.0, "gamma": None},
    "r-on": {"lambd": 0.0, "gamma": None},
    "fr-on": {"gamma": None},
}


@dataclass(kw_only=True)
class SFRon(Forgetting):
    r"""SFR-on, arXiv 2409.19732 (NeurIPS 2024).

    Saliency: ``(F_f + fisher_eps) / (F_r + fisher_eps) >= gamma`` on Fisher diagonals measured at the start.
    Forget term: :math:`-\alpha_t \sum_i \frac{c_i}{\sum c} l_i` with :func:`adaptive_shares`, on the mask.
    Retain term: the mean loss on retain batches, every weight. Geometry: retain steps from the forgotten weights
    approximate the retain Hessian's inverse; then the slow weights follow (``slow_rate``, ``slow_freq``).

    Args:
        forget_alpha: strength at the start; ``"auto"``: calibrated, as in
            :mod:`unlearn_ext.methods.calibration`, where lambd and the schedule do not apply.
        forget_term: ``ascent`` on the forget batch's losses, or ``replace``: descent of :math:`\alpha_t`
            times the mean of the task's losses towards what shall stand in its place; lambd then does not apply.
        forget_schedule: its course over the run.
        lambd: exponent of the adaptive weights; 0 is plain gradient ascent.
        gamma: the Fisher ratio a weight must reach to be moved by forgetting, 1 unless ``mask_fraction`` or ``mask`` is
            given; None: no mask.
        mask_fraction: instead of gamma, the fraction of all weights to be moved: those of the largest Fisher ratio.
        adaptive_eps: eps of the adaptive weights.
        fisher_eps: eps of the ratio.
        fisher_max_norm: each gradient is clipped to this norm before it is squared.
        fisher_batches: measure on at most this many batches of each set, or a pair: of the forget set and of the
            retain set.
        mask: a ready mask, used instead of measuring; excludes gamma and mask_fraction.

    The remaining arguments are those of :class:`Method` and of the optimizer.

    The paper's ablations are :data:`ABLATIONS`, for any preset, and presets of their own for CIFAR-10. DualOptim, arXiv
    2504.15827, is ``dual_state=True`` with ``forget_rule`` and ``forget_lr``; its settings are the ``-dual`` presets.
    """

    name: ClassVar[str] = "sfron"
    row: ClassVar[Row] = Row(
        saliency="Fisher ratio F_f / F_r ≥ gamma",
        forget_term="−α_t Σ c_i l_i / Σ c, c_i = 1 / (l_i^λ + eps)",
        retain_term="mean loss",
        geometry="retain steps from the forgotten weights, slow weights",
        source="arXiv 2409.19732",
    )
    ascends: ClassVar[bool] = True
    # Settings of the released code (K1nght/Unified-Unlearning-w-Remain-Geometry); classifiers: batches of 128.
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar10-resnet18": {
            "rule": "momentum",
            "lr": 0.01,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "lr_schedule": "cosine",
            "iterations": 1500,
            "forget_freq": 5,
            "forget_alpha": 25.0,
            "forget_schedule": "cosine",
            "lambd": 0.5,
            "gamma": 1.0,
            "max_norm": 7.0,
        },
        "tinyimagenet-swin": {
            "rule": "adamw",
            "lr": 2e-5,
            "weight_decay": 0.05,
            "lr_schedule": "cosine",
            "iterations": 500,
            "forget_freq": 1,
            "forget_alpha": 500.0,
            "forget_schedule": "cosine",
            "lambd": 0.6,
            "gamma": 1.0,
            "max_norm": 7.0,
        },
        # Diffusion; what the task and the run need beside these stands in domains.py.
        "ddpm-cifar10": {
            "rule": "adam",
            "lr": 1e-4,
            "iterations": 150,
            "forget_alpha": 10.0,
            "forget_schedule": "cosine",
            "lambd": 0.5,
            "adaptive_eps": 1e-8,
            "gamma": 1.0,
            "fisher_max_norm": 1.0,
            "max_norm": 1.0,
            "retain_max_norm": 1.0,
        },
        "dit-xl-2-256": {
            "rule": "adamw",
            "lr": 1e-4,
            "iterations": 600,
            "forget_alpha": 1e-3,
            "forget_schedule": "constant",
            "lambd": 0.0,
            "gamma": 1.0,
            "fisher_batches": 2000,
            "max_norm": 1.0,
        },
        "sd-nudity": {
            "rule": "adam",
            "lr": 1e-5,
            "iterations": 1000,
            "forget_term": "replace",
            "forget_alpha": 1.0,
            "forget_schedule": "constant",
            "gamma": 1.0,
        },
        # DualOptim (arXiv 2504.15827): Adam's own moments for forgetting, the original optimizer for retaining.
        "cifar10-resnet18-dual": {
            "rule": "momentum",
            "lr": 0.01,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "lr_schedule": "cosine",
            "iterations": 1500,
            "forget_freq": 5,
            "forget_alpha": 1.0,
            "forget_schedule": "cosine",
            "lambd": 0.5,
            "gamma": 1.0,
            "max_norm": 7.0,
            "dual_state": True,
            "forget_rule": "adam",
            "forget_lr": 1e-4,
        },
    }

    forget_schedule: str = "cosine"
    lambd: float = 0.5
    gamma: float | None = Default(1.0)
    adaptive_eps: float = 1e-15
    fisher_eps: float = 1e-15
    fisher_batches: int | tuple[int, int] | None = None
    fisher_max_norm: float | None = None
    forget_term: str = "ascent"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite("lambd", self.lambd)
        if self.gamma is not None:
            check_finite("gamma", self.gamma)
        for name in ("adaptive_eps", "fisher_eps"):
            check_number(name, getattr(self, name), "a finite number above 0", lambda x: 0.0 < x < math.inf)
        if self.forget_term not in ("ascent", "replace"):
            raise InputError(f"forget_term: expected ascent or replace, got {self.forget_term!r}")
        if self.fisher_max_norm is not None:
            check_number("fisher_max_norm", self.fisher_max_norm, "more than 0, or None", lambda x: x > 0.0)
        if isinstance(self.fisher_batches, (tuple, list)):  # a list, as JSON has it
            if len(self.fisher_batches) != 2:
                raise InputError(
                    f"fisher_batches: expected a number or a pair, of the forget and the retain set, got "
                    f"{self.fisher_batches!r}"
                )
            self.fisher_batches = tuple(self.fisher_batches)
        if self.fisher_batches is not None:
            for count in self.fisher_limits:
                check_count("fisher_batches", count)

    @property
    def fisher_limits(self) -> tuple[int | None, int | None]:
        """At most so many batches of the forget set and of the retain set are measured; None: all of them."""
        given = self.fisher_batches
        return given if isinstance(given, tuple) else (given, given)

    @property
    def needs_fisher(self) -> bool:
        return self.mask is None and (self.gamma is not None or self.mask_fraction is not None)

    @property
    def replaces(self) -> bool:
        return self.forget_term == "replace"

    def forget_loss(self, losses: Tensor, iteration: int) -> ForgetLoss:
        if self.replaces:
            return ForgetLoss(self.strength(iteration) * losses.mean())
        if self.calibration is not None:
            return self.ascent(losses, iteration)
        weights = adaptive_weights(losses, self.lambd, self.adaptive_eps)
        total = weights.sum()
        shares = weights / total
        return ForgetLoss(-self.strength(iteration) * (shares * losses).sum(), shares.max(), total)


SFRon.presets |= {
    f"cifar10-resnet18-{name}": {**SFRon.presets["cifar10-resnet18"], **left_out}
    for name, left_out in ABLATIONS.items()
}
