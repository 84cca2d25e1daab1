"""Measures of generated pictures: what a classifier says of them, and how their features are distributed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, first_line
from ..utils.arguments import describe
from .checks import checked_features, checked_labels

__all__ = ["class_scores", "frechet_distance", "gaussian_distance", "pairwise_distance", "torchmetrics_fid"]

INSTALL = 'pip install "unlearn_ext[fid]"'


def class_scores(probabilities: Tensor, labels: Tensor) -> dict[int, dict[str, float]]:
    """For every label: the fraction of its pictures that the classifier takes for it (``accuracy``), the mean
    probability it gives to it (``probability``), and the ``count``.

    Args:
        probabilities: [N, classes], of an external classifier.
        labels: integers [N], what the pictures were asked to show.

    Raises:
        InputError: no pictures, shapes that do not fit, or labels that the classifier does not know.
    """
    if not isinstance(probabilities, Tensor) or probabilities.dim() != 2 or not probabilities.numel():
        raise InputError(
            f"probabilities: expected a tensor of shape [pictures, classes], neither 0, got {describe(probabilities)}"
        )
    if not bool(torch.isfinite(probabilities).all()):
        raise InputError("probabilities: not all are finite, so the classifier cannot judge these pictures")
    probabilities = probabilities.detach().cpu().double()
    labels = checked_labels(labels, "labels", *probabilities.shape, "picture")
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
    real, generated = (checked_features(x, name) for x, name in ((real, "real"), (generated, "generated")))
    for name, features in (("real", real), ("generated", generated)):
        if features.shape[1] != real.shape[1]:
            raise InputError(f"{name}: expected features of shape [N, {real.shape[1]}], got {list(features.shape)}")
        if len(features) <= features.shape[1]:
            raise InputError(
                f"{name}: expected more samples than their {features.shape[1]} features, got {len(features)}: sample "
                "more pictures"
            )
    return gaussian_distance(real, generated)


def pairwise_distance(samples: Tensor) -> float:
    """Mean Euclidean distance between two different samples [N, ...], flattened: near 0 where all look alike."""
    return float(torch.pdist(checked_features(samples, "samples", least=2, flat=False).flatten(1)).mean())


def gaussian_distance(real: Tensor, generated: Tensor) -> float:
    r"""torchmetrics' Fréchet distance of float64 features [N, features] and [M, features].

    Its eigenvalues of a product of covariances take a minute or more for 2048 features. The smaller set of m samples
    and the difference of means lie in a space S of at most m + 1 dimensions, outside of which :math:`C_r C_g` has no
    eigenvalue but 0: there, only the larger set's variance counts. So with an orthonormal basis Q of S,

    .. math:: d(r, g) = d(r Q, g Q) + \mathrm{tr}\, C_r - \mathrm{tr}\, Q^T C_r Q

    (and C_g likewise, whose difference is 0, where g is the smaller), which for m of hundreds takes less than a second.
    """
    real = checked_features(real, "real", least=2)
    generated = checked_features(generated, "generated", least=2)
    if generated.shape[1] != real.shape[1]:
        raise InputError(f"generated: expected features of shape [N, {real.shape[1]}], got {list(generated.shape)}")
    rest = 0.0
    small = min(real, generated, key=len)
    if len(small) + 1 < real.shape[1]:
        middle = small.mean(0)
        spanned = torch.cat([small - middle, (real.mean(0) - generated.mean(0))[None]])
        basis = torch.linalg.qr(spanned.T).Q
        rest += float(real.var(0).sum() + generated.var(0).sum())
        real, generated = (real - middle) @ basis, (generated - middle) @ basis
        rest -= float(real.var(0).sum() + generated.var(0).sum())
    as_they_are = nn.Identity()  # in place of the network: the features are made already
    as_they_are.num_features = real.shape[1]
    metric = torchmetrics_fid()(feature=as_they_are).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return float(metric.compute()) + rest


def torchmetrics_fid() -> type[Any]:
    """torchmetrics' FrechetInceptionDistance, which imports torch-fidelity where that is installed."""
    with importing():
        from torchmetrics.image.fid import FrechetInceptionDistance
    return FrechetInceptionDistance


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """torch-fidelity brings torchvision, whose operators fail with all kinds of errors beside a torch that they were
    not built for."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f"FID needs {error.name}, which is not installed: {INSTALL}") from None
    except Exception as error:
        raise InputError(
            f"torch-fidelity cannot be imported ({first_line(error)}): its torchvision has to be the release that "
            f"belongs to torch {torch.__version__}"
        ) from None
