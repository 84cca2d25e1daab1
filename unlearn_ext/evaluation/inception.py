"""FID with Inception features, by torchmetrics and torch-fidelity; the network's weights have to be on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, first_line
from ..utils.arguments import describe
from ..utils.files import user_path
from ..utils.hashing import file_hash
from ..utils.pixels import to_bytes
from ..utils.reading import check_opens, check_stored
from .generated import INSTALL, gaussian_distance, importing, torchmetrics_fid

__all__ = ["INCEPTION_FILE", "PICTURES_AT_ONCE", "InceptionFID", "check_file", "inception_fid"]

# One file under two names: of torch-fidelity's release v0.2.0, and of pytorch-fid's release fid_weights.
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WHERE_TO_GET = (
    f"put torch-fidelity's {INCEPTION_FILE} there (of its release v0.2.0 on GitHub; pytorch-fid calls the same file "
    "pt_inception-2015-12-05-6726825d.pth)"
)

PICTURES_AT_ONCE = 32


def check_file(path: str | Path) -> None:
    """Raises InputError where there is none."""
    if not Path(path).is_file():
        raise InputError(f"FID needs Inception's weights and there are none at {path}: {WHERE_TO_GET}")


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
        published: whether it is the published one, :data:`INCEPTION_SHA256`; others' numbers compare with nothing else.

    Raises:
        InputError: the weights are not there or are no Inception's, or a package is missing. No number stands for it.

    Source: arXiv 1706.08500.
    """

    def __init__(self, weights: str | Path, features: int = 2048, device: torch.device | str = "cpu"):
        if not isinstance(features, int) or features not in (64, 192, 768, 2048):
            raise InputError(f"features: expected 64, 192, 768 or 2048, got {describe(features)}")
        if not isinstance(weights, (str, Path)):
            raise InputError(f"weights: expected the path of {INCEPTION_FILE}, got {describe(weights)}")
        path = user_path(weights)
        check_file(path)
        self.features = features
        _check_tensors(path)
        self.sha256 = file_hash(path)
        self.published = self.sha256 == INCEPTION_SHA256
        for package in ("torchmetrics", "torch_fidelity"):
            if find_spec(package) is None:
                raise InputError(f"FID needs {package.replace('_', '-')}, which is not installed: {INSTALL}")
        with importing():  # first: torchmetrics would take one that fails for one that is not installed
            import torch_fidelity.feature_extractor_inceptionv3  # noqa: F401
        metric = torchmetrics_fid()
        try:
            network = metric(feature=features, feature_extractor_weights_path=str(path), antialias=False).inception
        except TypeError as error:  # an argument of newer releases
            raise InputError(f"FID cannot use this torchmetrics ({first_line(error)}): {INSTALL} -U") from None
        except ModuleNotFoundError as error:
            raise InputError(f"FID cannot use torch-fidelity ({first_line(error)}): {INSTALL}") from None
        except Exception as error:  # of load_state_dict and of what it is given
            raise InputError(
                f"{path} does not hold Inception's weights ({first_line(error)}): {WHERE_TO_GET}"
            ) from None
        self.device = torch.device(device)
        self.network = network.to(self.device).eval()
        generator = torch.Generator().manual_seed(0)
        probe = torch.rand(2, 3, 32, 32, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1
        found = self.extract(probe)
        # Weights of zeros, say, would make all pictures alike and every distance 0.
        if not bool(torch.isfinite(found).all()) or torch.equal(found[0], found[1]):
            raise InputError(f"{path} holds weights whose features tell no pictures apart: {WHERE_TO_GET}")
        self._real: list[Tensor] = []

    @property
    def protocol(self) -> dict[str, Any]:
        """What has to stand beside every distance, but for the pictures'."""
        return {
            "features": self.features,
            "resize": "299 x 299, bilinear as TensorFlow 1's",
            "weights_sha256": self.sha256,
            "published_weights": self.published,
        }

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
        if not isinstance(generated, Tensor) or not generated.dim():
            raise InputError(f"generated: expected pictures of shape [N, 1 or 3, H, W], got {describe(generated)}")
        for name, count in (("real", self.real), ("generated", len(generated))):
            if count < 2:
                raise InputError(f"FID needs at least 2 {name} pictures, got {count}")
        parts: list[Tensor] = []
        for features in self._in_parts("generated", generated):
            parts.append(features)
            progress(sum(map(len, parts)), len(generated))
        found = gaussian_distance(torch.cat(self._real).double(), torch.cat(parts).double())
        if not math.isfinite(found):
            raise InputError(f"FID is {found}: the features' covariances have no finite distance")
        return found

    @torch.no_grad()
    def extract(self, pictures: Tensor) -> Tensor:
        """Features, float32 [N, features] on the CPU, of pictures [N, 1 or 3, H, W] in [-1, 1]."""
        return self.network(to_bytes(pictures).expand(-1, 3, -1, -1).to(self.device)).float().cpu()

    def _in_parts(self, name: str, pictures: Tensor) -> Iterator[Tensor]:
        fits = isinstance(pictures, Tensor) and pictures.dim() == 4 and pictures.is_floating_point()
        if not fits or pictures.shape[1] not in (1, 3) or not pictures.numel():
            raise InputError(
                f"{name}: expected pictures of shape [N, 1 or 3, H, W] in [-1, 1], got {describe(pictures)}"
            )
        for part in pictures.split(PICTURES_AT_ONCE):
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


def _check_tensors(path: Path) -> None:
    """Whether the file holds tensors by name and nothing else.

    torch-fidelity unpickles whatever it is given, which may run code; torch's restricted reader does not.
    """
    check_stored(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        whole = isinstance(state, dict) and bool(state) and all(isinstance(value, Tensor) for value in state.values())
    except Exception:  # a damaged file makes unpickling raise nearly anything
        check_opens(path)
        whole = False
    if not whole:
        raise InputError(f"{path} does not hold Inception's weights (it is no file of tensors): {WHERE_TO_GET}")
