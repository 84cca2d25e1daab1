"""Measures of generated pictures: what a classifier says of them, and how their features are distributed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

__all__ = ["InceptionFID", "class_scores", "frechet_distance", "inception_fid", "pairwise_distance"]

# One file under two names: of torch-fidelity's release v0.2.0, and of pytorch-fid's release fid_weights.
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WHERE_TO_GET = (
    f"put torch-fidelity's {INCEPTION_FILE} there (of its release v0.2.0 on GitHub; pytorch-fid calls the same file "
    "pt_inception-2015-12-05-6726825d.pth)"
)

_INSTALL = 'pip install "unlearn_ext[fid]"'
_PICTURES_AT_ONCE = 32


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
    return _distance(real.detach().cpu().double(), generated.detach().cpu().double())


class InceptionFID:
    r"""FID with Inception features: :func:`frechet_distance` of real and generated pictures in ``features`` numbers
    of the network that TensorFlow's FID uses, as torch-fidelity holds it.

    The constructor checks what is needed and loads the network once; real pictures are added in parts, and only their
    features are kept. Pictures become bytes, grey ones RGB, and are resized to 299 × 299 as TensorFlow 1 did it
    (bilinear, not antialiased), so that numbers are those of the original and of torch-fidelity. torchmetrics takes
    the features in float32, and of them means, covariances and their distance in float64.

    With N pictures of a set, FID is biased upward by about a constant over N (arXiv 1911.07023); with no more than
    ``features`` of them a covariance is singular besides. So compare such numbers only at equal counts.

    Args:
        weights: the file :data:`INCEPTION_FILE`, which has to be on disk: nothing is downloaded.
        features: 64, 192, 768 or 2048; published numbers are of 2048.
        device: of the network.

    Attributes:
        network: Inception.
        real: number of real pictures added.
        sha256: of the weights file.
        known: whether it is the published one, :data:`INCEPTION_SHA256`; numbers of others compare with nothing else.

    Raises:
        InputError: the weights are not there or are no Inception's, or a package is missing. No number stands for it.

    Source: arXiv 1706.08500.
    """

    def __init__(self, weights: str | Path, features: int = 2048, device: torch.device | str = "cpu"):
        if features not in (64, 192, 768, 2048):
            raise InputError(f"features: expected 64, 192, 768 or 2048, got {features!r}")
        path = Path(weights)
        if not path.is_file():
            raise InputError(f"FID needs Inception's weights and there are none at {path}: {WHERE_TO_GET}")
        self.features = features
        self.sha256 = _check_tensors(path)
        self.known = self.sha256 == INCEPTION_SHA256
        for package in ("torchmetrics", "torch_fidelity"):
            if find_spec(package) is None:
                raise InputError(f"FID needs {package.replace('_', '-')}, which is not installed: {_INSTALL}")
        metric = _torchmetrics_fid(with_network=True)
        try:
            network = metric(feature=features, feature_extractor_weights_path=str(path), antialias=False).inception
        except TypeError as error:  # an argument of newer releases
            raise InputError(f"FID cannot use this torchmetrics ({_first_line(error)}): {_INSTALL} -U") from None
        except ModuleNotFoundError as error:
            raise InputError(f"FID cannot use torch-fidelity ({_first_line(error)}): {_INSTALL}") from None
        except Exception as error:  # of load_state_dict and of what it is given
            raise InputError(
                f"{path} does not hold Inception's weights ({_first_line(error)}): {WHERE_TO_GET}"
            ) from None
        self.device = torch.device(device)
        self.network = network.to(self.device).eval()
        probe = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        found = self.extract(probe)
        # Weights of zeros, say, would make all pictures alike and every distance 0.
        if not bool(torch.isfinite(found).all()) or torch.equal(found[0], found[1]):
            raise InputError(f"{path} holds weights whose features tell no pictures apart: {WHERE_TO_GET}")
        self._real: list[Tensor] = []

    @property
    def real(self) -> int:
        return sum(map(len, self._real))

    def add_real(self, pictures: Tensor) -> None:
        """Adds pictures [N, 1 or 3, H, W] in [-1, 1] to the real ones."""
        self._real += self._in_parts("real", pictures)

    def distance(self, generated: Tensor, progress: Callable[[int, int], None] = lambda done, total: None) -> float:
        """FID of pictures [N, 1 or 3, H, W] in [-1, 1] and the real ones added so far.

        Raises:
            InputError: fewer than two pictures of a kind, or pixels that are not finite; or the distance is not.
        """
        for name, count in (("real", self.real), ("generated", len(generated))):
            if count < 2:
                raise InputError(f"FID needs at least 2 {name} pictures, got {count}")
        parts: list[Tensor] = []
        for features in self._in_parts("generated", generated):
            parts.append(features)
            progress(sum(map(len, parts)), len(generated))
        found = _distance(torch.cat(self._real).double(), torch.cat(parts).double())
        if not math.isfinite(found):
            raise InputError(f"FID is {found}: the features' covariances have no finite distance")
        return found

    @torch.no_grad()
    def extract(self, pictures: Tensor) -> Tensor:
        """Features, float32 [N, features] on the CPU, of pictures [N, 1 or 3, H, W] in [-1, 1]."""
        pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return self.network(pixels.expand(-1, 3, -1, -1).to(self.device)).float().cpu()

    def _in_parts(self, name: str, pictures: Tensor) -> Iterator[Tensor]:
        if pictures.dim() != 4 or pictures.shape[1] not in (1, 3):
            raise InputError(f"{name}: expected pictures of shape [N, 1 or 3, H, W], got {list(pictures.shape)}")
        for part in pictures.split(_PICTURES_AT_ONCE):
            if not bool(torch.isfinite(part).all()):  # as bytes they would be black
                raise InputError(f"{name}: not all pixels are finite, so FID cannot judge these pictures")
            features = self.extract(part)
            if not bool(torch.isfinite(features).all()):
                raise InputError(f"{name}: not all features are finite")
            yield features


def inception_fid(real: Tensor, generated: Tensor, weights: str | Path, features: int = 2048) -> float:
    """:class:`InceptionFID` of two sets of pictures [N, 1 or 3, H, W] in [-1, 1]."""
    fid = InceptionFID(weights, features)
    fid.add_real(real)
    return fid.distance(generated)


def pairwise_distance(samples: Tensor) -> float:
    """Mean Euclidean distance between two different samples [N, ...], flattened: near 0 where all look alike."""
    if len(samples) < 2:
        raise InputError(f"samples: expected at least 2 to compare, got {len(samples)}")
    return float(torch.pdist(samples.detach().double().cpu().flatten(1)).mean())


def _distance(real: Tensor, generated: Tensor) -> float:
    r"""torchmetrics' Fréchet distance of float64 features [N, features] and [M, features].

    Its eigenvalues of a product of covariances take a minute or more for 2048 features. The smaller set of m samples
    and the difference of means lie in a space S of at most m + 1 dimensions, outside of which :math:`C_r C_g` has no
    eigenvalue but 0: there, only the larger set's variance counts. So with an orthonormal basis Q of S,

    .. math:: d(r, g) = d(r Q, g Q) + \mathrm{tr}\, C_r - \mathrm{tr}\, Q^T C_r Q

    (and C_g likewise, whose difference is 0, where g is the smaller), which for m of hundreds takes less than a second.
    """
    rest = 0.0
    small = min(real, generated, key=len)
    if len(small) + 1 < real.shape[1]:
        middle = small.mean(0)
        spanned = torch.cat([small - middle, (real.mean(0) - generated.mean(0))[None]])
        basis = torch.linalg.qr(spanned.T).Q
        rest += float(real.var(0).sum() + generated.var(0).sum())
        real, generated = (real - middle) @ basis, (generated - middle) @ basis
        rest -= float(real.var(0).sum() + generated.var(0).sum())
    metric = _torchmetrics_fid()(feature=_AsTheyAre(real.shape[1])).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return float(metric.compute()) + rest


class _AsTheyAre(nn.Module):
    """Stands for the network whose features torchmetrics wants: they are made already."""

    def __init__(self, features: int):
        super().__init__()
        self.num_features = features

    def forward(self, features: Tensor) -> Any:
        return features


def _torchmetrics_fid(*, with_network: bool = False) -> type[Any]:
    """torchmetrics' FrechetInceptionDistance.

    It imports torch-fidelity where that is installed, and with it torchvision, whose operators fail with all kinds of
    errors beside a torch that they were not built for.
    """
    try:
        if with_network:  # torchmetrics would take one that fails for one that is not installed
            import torch_fidelity.feature_extractor_inceptionv3  # noqa: F401
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ModuleNotFoundError as error:
        raise InputError(f"FID needs {error.name}, which is not installed: {_INSTALL}") from None
    except Exception as error:
        raise InputError(
            f"torch-fidelity cannot be imported ({_first_line(error)}): its torchvision has to be the release that "
            f"belongs to torch {torch.__version__}"
        ) from None
    return FrechetInceptionDistance


def _check_tensors(path: Path) -> str:
    """The file's SHA-256, once it is known to hold tensors by name and nothing else.

    torch-fidelity unpickles whatever it is given, which may run code; torch's restricted reader does not.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        whole = isinstance(state, dict) and bool(state) and all(isinstance(value, Tensor) for value in state.values())
    except Exception:  # a damaged file makes unpickling raise nearly anything
        whole = False
    if not whole:
        raise InputError(f"{path} does not hold Inception's weights (it is no file of tensors): {WHERE_TO_GET}")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    """What and why, shortly: load_state_dict names every tensor that it misses, a line each."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
