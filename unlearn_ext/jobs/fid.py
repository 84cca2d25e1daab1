"""FID of the pictures of sampled retained classes, before and after, against the real images of the same classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.drawing import draw_real, until_readable
from ..data.images import ImageData
from ..errors import InputError, first_line
from ..evaluation.inception import PICTURES_AT_ONCE, InceptionFID

__all__ = ["RetainedFID"]

MOST_REAL = 10_000  # images: several times the 2048 features, and a bound on the time they take
_Progress = Callable[[int, int], None]


class RetainedFID:
    """The constructor checks everything and loads the network; no image is decoded.

    Every class has ``each`` generated pictures. Real images are all of these classes that can be read, or
    at most 10,000, drawn with the run's seed and as equally over the classes as they allow. Where the data hold the
    classes unequally, so do the real images, and that adds to both distances.

    Args:
        classes: the retained classes that are sampled, each with the labels of its images in the data.
        generated: number of generated pictures at a time.
        planned: number of real images, unless some cannot be read.

    Raises:
        InputError: there are no real images to compare with, or :class:`InceptionFID` cannot be had.
    """

    def __init__(
        self,
        weights: Path,
        data: ImageData,
        classes: Mapping[int, Sequence[int]],
        each: int,
        seed: int,
        device: torch.device | str = "cpu",
    ):
        if data.kind != "pixel_values":
            raise InputError(
                "--fid-weights: FID compares with real images, and --data holds latents: give it images, or leave "
                "--fid-weights out"
            )
        self.data, self.classes, self.seed = data, dict(classes), seed
        self.planned = len(self._draw(()))
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

    def _draw(self, exclude: Iterable[int]) -> Tensor:
        return draw_real(self.data.labels, self.classes.values(), self.seed, most=MOST_REAL, exclude=exclude)

    def add_real(self, *, strict: bool = False, looking: _Progress | None = None, progress: _Progress) -> None:
        """Decodes the real images and keeps their features, 8 kB of each.

        Args:
            strict: an unreadable image is an error; otherwise others take its place.
            looking, progress: called with (done, all), while images are decoded, and while features are taken.
        """
        data = self.data
        chosen = until_readable(
            data, self._draw, lambda drawn: data.verify(drawn.tolist(), strict=strict, progress=looking)
        )
        self._check_count("readable images", len(chosen))
        for part in chosen.split(PICTURES_AT_ONCE):
            self.inception.add_real(torch.stack([data[i]["pixel_values"] for i in part.tolist()]))
            progress(self.inception.real, len(chosen))
        labels = data.labels[chosen]
        self._by_class = [
            int(torch.isin(labels, torch.tensor(members, device="cpu")).sum()) for members in self.classes.values()
        ]

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
        distances: dict[str, Any] = {}
        errors = []
        for when, pictures in taken.items():
            try:
                distances[when] = self.inception.distance(
                    pictures, lambda done, total, when=when: progress(when, done, total)
                )
            except (InputError, RuntimeError) as error:  # also of linear algebra that does not converge, or of memory
                distances[when] = None
                errors.append(f"{when}: {first_line(error)}")
        if errors:
            distances["error"] = "; ".join(errors)
        return distances | {
            "real": self.inception.real,
            "generated": self.generated,
            "classes": [names[label] for label in self.classes],
            "real_by_class": self._by_class,
            **self.inception.protocol,
        }
