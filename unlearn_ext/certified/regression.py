"""The one model that is certified: softmax regression with an L2 penalty on every weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..errors import InputError
from ..utils.arguments import check_count, check_number

__all__ = ["SoftmaxRegression"]

_ROUNDING = 1e-12  # by which a row of norm 1 may exceed it


@dataclass(frozen=True)
class SoftmaxRegression:
    r"""Multinomial logistic regression, :math:`F(\theta) = \frac1n \sum_i \mathrm{CE}(\theta^\top x_i, y_i) +
    \frac{l_2}{2} \lVert\theta\rVert^2` with θ of shape ``[features, classes]``, float64.

    A bias is a feature like any other, and is penalised like any other: :func:`~unlearn_ext.certified.unit_rows` adds
    it.

    Args:
        features: length of a row, the bias entry included.
        classes: how many; fixed in advance, so that deleting a class's last sample does not change the model's shape.
        l2: strength of the penalty, of the mean loss.
        feature_bound: no row's norm exceeds this. It has to be known without looking at the data, since a bound
            measured on them would depend on samples that are deleted later; the data are checked against it.
    """

    features: int
    classes: int
    l2: float = 0.05
    feature_bound: float = 1.0

    def __post_init__(self) -> None:
        check_count("features", self.features)
        check_count("classes", self.classes)
        if self.classes < 2:
            raise InputError("classes: expected at least 2, got 1")
        for name in ("l2", "feature_bound"):
            check_number(name, getattr(self, name), "a finite number above 0", lambda x: 0.0 < x < math.inf)

    @property
    def row_bound(self) -> float:
        """What no row that :meth:`check_data` lets pass exceeds: ``feature_bound`` with its tolerance, and the rounding
        of the norm that was compared with it, less than (features / 2 + 2) 2^-53 of it."""
        return self.feature_bound * (1.0 + _ROUNDING + (self.features + 2) * 2.0**-52)

    def check_data(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Copies as float64 ``[n, features]`` and int64 ``[n]``.

        Raises:
            InputError: other shapes, numbers that are not finite, a row above the bound, a label out of range.
        """
        features, labels = torch.as_tensor(features, device="cpu"), torch.as_tensor(labels, device="cpu")
        if features.dim() != 2 or features.shape[1] != self.features or not len(features):
            raise InputError(f"features: expected shape [n, {self.features}], n from 1, got {list(features.shape)}")
        if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise InputError(
                f"labels: expected integers of shape [n], got {labels.dtype} of shape {list(labels.shape)}"
            )
        if len(labels) != len(features):
            raise InputError(f"labels: expected one for each of {len(features)} rows, got {len(labels)}")
        features = features.detach().to("cpu", torch.float64, copy=True).contiguous()
        labels = labels.detach().to("cpu", torch.int64, copy=True)
        if not bool(torch.isfinite(features).all()):
            raise InputError("features: expected finite numbers, got inf or NaN: clean the data first")
        largest = float(features.norm(dim=1).max())
        if largest > self.feature_bound * (1.0 + _ROUNDING):
            raise InputError(
                f"features: a row has norm {largest:.6g}, above feature_bound={self.feature_bound:g}: scale the rows "
                "one by one (unit_rows), or state a bound that every possible row keeps"
            )
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= self.classes:
            raise InputError(
                f"label {lowest if lowest < 0 else highest} is outside the model's {self.classes} classes (0 to "
                f"{self.classes - 1}): check the labels or the model"
            )
        return features, labels

    def descend(
        self, weights: Tensor, features: Tensor, labels: Tensor, *, steps: int, eta: float, radius: float
    ) -> Tensor:
        r"""Projected full-batch gradient descent: :math:`\theta \leftarrow \Pi_R(\theta - \eta \nabla F(\theta))`.

        The step is that of every method here, :func:`~unlearn_ext.ops.step_` with rule ``sgd``; the penalty's gradient
        is its coupled weight decay. :math:`\Pi_R` scales weights of a norm above ``radius`` back to it.

        Args:
            weights: float64 ``[features, classes]``, left as they are.

        Returns:
            New weights.
        """
        weights = weights.detach().clone()
        targets = torch.nn.functional.one_hot(labels, self.classes).to(torch.float64)
        scalars = ops.scalars(lr=eta, weight_decay=self.l2)
        with torch.no_grad():
            for _ in range(steps):
                residuals = torch.softmax(features @ weights, dim=1).sub_(targets)
                gradient = (features.mT @ residuals).div_(len(labels))
                ops.step_([weights], rule="sgd", scalars=scalars, retain_grads=[gradient])
                norm = float(weights.norm())
                if norm > radius:
                    weights.mul_(radius / norm)
        return weights
