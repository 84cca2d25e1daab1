"""Frechet distances computed another way, and the features that a stand-in network gives."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def frechet(real: np.ndarray, generated: np.ndarray) -> float:
    """In float64 numpy, by singular values: tr (C_r C_g)^(1/2) is the nuclear norm of A B^T, where C_r = A^T A and
    C_g = B^T B; no root of a matrix, and no rank that it needs."""
    means, roots = [], []
    for features in (real, generated):
        features = np.asarray(features, np.float64)
        means.append(features.mean(0))
        roots.append((features - means[-1]) / np.sqrt(len(features) - 1))
    traces = sum(float((root**2).sum()) for root in roots)
    nuclear = float(np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum())
    return float(((means[0] - means[1]) ** 2).sum()) + traces - 2 * nuclear


def features_of(pictures: Tensor, weight: Tensor) -> np.ndarray:
    """The stand-in's, in float64."""
    pixels = np.rint((pictures.numpy().clip(-1, 1) + 1) * np.float32(127.5)).astype(np.float64)
    pixels = np.broadcast_to(pixels, (len(pixels), 3, *pixels.shape[2:]))
    return ((pixels - 128) / 128).mean((2, 3)) @ weight.double().numpy()
