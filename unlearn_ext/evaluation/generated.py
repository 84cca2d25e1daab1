"""Measures of generated pictures: what a classifier says of them, and how their features are distributed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

__all__ = ["class_scores", "frechet_distance", "inception_fid", "pairwise_distance"]


def class_scores(probabilities: Tensor, labels: Tensor) -> dict[int, dict[str, float]]:
    """For every label: the fraction of its pictures that the classifier takes for it (``accuracy``), the mean
    probability it gives to it (``probability``), and the ``count``.

    Args:
        probabilities: [N, classes], of an external classifier.
        labels: integers [N], what the pictures were asked to show.
    """
    if probabilities.dim() != 2 or len(probabilities) != len(labels):
        raise InputError(f"probabilities: expected shape [{len(labels)}, classes], got {list(probabilities.shape)}")
    if not bool(torch.isfinite(probabilities).all()):
        raise InputError("probabilities: not all are finite, so the classifier cannot judge these pictures")
    probabilities, labels = probabilities.detach().double().cpu(), labels.cpu().long()
    if int(labels.min()) < 0 or int(labels.max()) >= probabilities.shape[1]:
        raise InputError(f"labels: expected 0 to {probabilities.shape[1] - 1}, which the classifier knows")
    right = probabilities.argmax(dim=1) == labels
    own = probabilities.gather(1, labels[:, None]).squeeze(1)
    return {
        int(label): {
            "accuracy": float(right[labels == label].double().mean()),
            "probability": float(own[labels == label].mean()),
            "count": int((labels == label).sum()),
        }
        for label in labels.unique()
    }


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    r"""Distance of two sets of features, taken for Gaussian:
    :math:`|\mu_r - \mu_g|^2 + \mathrm{tr}(C_r + C_g - 2 (C_r C_g)^{1/2})`, in float64, by torchmetrics.

    Args:
        real, generated: [N, features] each, with more than ``features`` samples, or the covariances are singular.

    Source: arXiv 1706.08500.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    for name, features in (("real", real), ("generated", generated)):
        if features.dim() != 2 or features.shape[1] != real.shape[1]:
            raise InputError(f"{name}: expected features of shape [N, {real.shape[1]}], got {list(features.shape)}")
        if len(features) <= features.shape[1]:
            raise InputError(
                f"{name}: expected more samples than their {features.shape[1]} features, got {len(features)}: sample "
                "more pictures"
            )
        if not bool(torch.isfinite(features).all()):
            raise InputError(f"{name}: not all features are finite")
    metric = FrechetInceptionDistance(feature=_AsTheyAre(real.shape[1])).set_dtype(torch.float64)
    metric.update(real.detach().cpu().double(), real=True)
    metric.update(generated.detach().cpu().double(), real=False)
    return float(metric.compute())


def inception_fid(real: Tensor, generated: Tensor, weights: str | Path, features: int = 2048) -> float:
    """FID with Inception features through torchmetrics and torch-fidelity, which need their weights on disk.

    Args:
        real, generated: pictures [N, 3, H, W] in [-1, 1].
        weights: the file ``pt_inception-2015-12-05-6726825d.pth`` of torch-fidelity's releases.
        features: 64, 192, 768 or 2048.

    Raises:
        InputError: the weights are not there. No number is made up for it.
    """
    path = Path(weights)
    if not path.is_file():
        raise InputError(
            f"FID needs Inception's weights and there are none at {path}: put torch-fidelity's "
            "pt_inception-2015-12-05-6726825d.pth there"
        )
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        metric = FrechetInceptionDistance(feature=features, feature_extractor_weights_path=str(path))
    except ModuleNotFoundError:
        raise InputError("FID with Inception features needs torch-fidelity: pip install torch-fidelity") from None
    except Exception as error:
        raise InputError(f"{path} does not hold Inception's weights: {type(error).__name__}: {error}") from None
    for pictures, real_ones in ((real, True), (generated, False)):
        for part in pictures.split(32):
            metric.update(((part.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), real=real_ones)
    return float(metric.compute())


def pairwise_distance(samples: Tensor) -> float:
    """Mean Euclidean distance between two different samples [N, ...], flattened: near 0 where all look alike."""
    if len(samples) < 2:
        raise InputError(f"samples: expected at least 2 to compare, got {len(samples)}")
    return float(torch.pdist(samples.detach().double().cpu().flatten(1)).mean())


class _AsTheyAre(nn.Module):
    """Stands for the network whose features torchmetrics wants: they are made already."""

    def __init__(self, features: int):
        super().__init__()
        self.num_features = features

    def forward(self, features: Tensor) -> Any:
        return features
