"""FID of the pictures of retained classes, before and after, against the real images of the same classes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.images import ImageData
from ..errors import InputError
from ..evaluation.generated import InceptionFID

__all__ = ["RetainedFID", "draw_real", "even_shares"]

MOST_REAL = 10_000  # images: several times the 2048 features, and a bound on the time they take
_AT_ONCE = 32
_Progress = Callable[[int, int], None]


def even_shares(counts: Sequence[int], most: int) -> list[int]:
    """How many of each, at most ``most`` in all and as equal as ``counts`` allow: the largest give way first."""
    shares, left = [0] * len(counts), most
    for position, i in enumerate(sorted(range(len(counts)), key=counts.__getitem__)):
        shares[i] = min(counts[i], left // (len(counts) - position))
        left -= shares[i]
    return shares


def draw_real(
    labels: Tensor, classes: Iterable[int], seed: int, *, most: int = MOST_REAL, exclude: Iterable[int] = ()
) -> Tensor:
    """Indices of the real images that stand for these classes: all, or an even draw of ``most``; int64 [N], sorted.

    Args:
        labels: int64, of the whole data.
        exclude: samples that cannot be used; others take their place.
    """
    usable = torch.ones(len(labels), dtype=torch.bool)
    usable[torch.tensor(sorted(set(map(int, exclude))), dtype=torch.int64)] = False
    generator = torch.Generator().manual_seed(seed)
    orders: list[Tensor] = []
    for label in classes:
        members = (labels == label).nonzero().flatten()
        order = members[torch.randperm(len(members), generator=generator)]  # the same, whatever is excluded
        orders.append(order[usable[order]])
    shares = even_shares([len(order) for order in orders], most)
    return torch.cat([order[:share] for order, share in zip(orders, shares, strict=True)]).sort().values


class RetainedFID:
    """The constructor checks everything and loads the network; no image is decoded.

    Every class has ``each`` generated pictures. Real images are all of these classes that can be read, or
    at most 10,000, drawn with the run's seed and as equally over the classes as they allow. Where the data hold the
    classes unequally, so do the real images, and that adds to both distances.

    Attributes:
        classes: retained classes that are sampled.
        generated: number of generated pictures at a time.
        planned: number of real images, unless some cannot be read.

    Raises:
        InputError: there are no real images to compare with, or :class:`InceptionFID` cannot be had.
    """

    def __init__(
        self,
        weights: Path,
        data: ImageData,
        classes: Sequence[int],
        each: int,
        seed: int,
        device: torch.device | str = "cpu",
    ):
        if data.kind != "pixel_values":
            raise InputError(
                "--fid-weights: FID compares with real images, and --data holds latents: give it images, or leave "
                "--fid-weights out"
            )
        self.data, self.classes, self.seed = data, list(classes), seed
        self.planned = len(draw_real(data.labels, self.classes, seed))
        self.generated = each * len(self.classes)
        self._check_count("real images", self.planned)
        self._check_count("generated pictures", self.generated)
        try:
            self.inception = InceptionFID(weights, device=device)
        except InputError as error:
            raise InputError(f"--fid-weights: {error}") from None
        self._by_class: list[int] = []

    def _check_count(self, what: str, count: int) -> None:
        if count < 2:
            raise InputError(f"--fid-weights: FID needs at least 2 {what} of the retained classes, got {count}")

    @property
    def seconds(self) -> float:
        """About what the features take, from two pictures that are tried."""
        started = time.perf_counter()
        self.inception.extract(torch.zeros(2, 3, 299, 299))
        return (time.perf_counter() - started) / 2 * (self.planned + 2 * self.generated)

    def add_real(self, *, strict: bool = False, looking: _Progress | None = None, progress: _Progress) -> None:
        """Decodes the real images and takes their features, of which sums are kept.

        Args:
            strict: an unreadable image is an error; otherwise others take its place.
            looking, progress: called with (done, all), while images are decoded, and while features are taken.
        """
        data = self.data
        while True:
            known = set(data.unreadable)
            chosen = draw_real(data.labels, self.classes, self.seed, exclude=known)
            data.verify(chosen.tolist(), strict=strict, progress=looking)
            if set(data.unreadable) == known:
                break
        self._check_count("readable images", len(chosen))
        for part in chosen.split(_AT_ONCE):
            self.inception.add_real(torch.stack([data[i]["pixel_values"] for i in part.tolist()]))
            progress(self.inception.real, len(chosen))
        self._by_class = [int((data.labels[chosen] == label).sum()) for label in self.classes]

    def measure(
        self,
        taken: Mapping[str, Tensor],
        names: Mapping[int, str],
        progress: Callable[[str, int, int], None] = lambda when, done, total: None,
    ) -> dict[str, Any]:
        """Time -> distance, and what has to stand beside it.

        A distance that cannot be computed is None, and ``error`` says why: the model is written by then, and its
        report must not be lost.

        Args:
            taken: time, such as ``before`` -> pictures [N, C, H, W] in [-1, 1] of the retained classes.
            names: class -> text.
        """
        found: dict[str, Any] = {}
        errors = []
        for when, pictures in taken.items():
            try:
                found[when] = self.inception.distance(
                    pictures, lambda done, total, when=when: progress(when, done, total)
                )
            except (InputError, RuntimeError) as error:  # also of linear algebra that does not converge, or of memory
                found[when] = None
                errors.append(f"{when}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        if errors:
            found["error"] = "; ".join(errors)
        return found | {
            "real": self.inception.real,
            "generated": self.generated,
            "features": self.inception.features,
            "classes": [names[label] for label in self.classes],
            "real_by_class": self._by_class,
            "resize": "299 x 299, bilinear as TensorFlow 1's",
            "weights_sha256": self.inception.sha256,
            "published_weights": self.inception.known,
        }
