"""A user's data for diffusion: one folder per class, or arrays of images or latents in .npz and safetensors files.

Nothing is decoded until it is asked for. PIL is needed for pictures only.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from ..utils.arguments import check_choice
from ..utils.files import user_path
from ._array_files import read_arrays
from ._arrays import array_labels, open_arrays
from ._assigning import is_sorted
from ._folders import class_folders, open_folders
from ._source import Source, Unreadable
from .labels import label_names, parse_classes, printable

__all__ = ["ClassRow", "ImageData", "count_classes", "is_sorted", "open_data"]

INTERPOLATIONS = ("bilinear", "bicubic", "lanczos", "nearest")

_SIGNATURE = "unlearn_ext.data.1"


class ClassRow(NamedTuple):
    """One line of the mapping that is printed before a run."""

    index: int
    folder: str | None
    text: str | None
    count: int


class ImageData(Dataset):
    """Labelled images or latents, decoded one by one; made by :func:`open_data`.

    A sample is a dict of float32 tensors and its int64 label: ``pixel_values`` [C, H, W] in [-1, 1], or ``latents``
    [C, h, w] (or ``latent_mean`` and ``latent_std``), as the VAE gives them: its scaling factor is not applied.

    Attributes:
        labels: int64 [N], known without decoding.
        kind: ``pixel_values``, ``latents`` or ``latent_moments``.
        preprocessing: what is done to a picture, in words and numbers.
        folders: folder -> class; empty for arrays.
        ignored: files that are no pictures, or lie outside the class folders.
        unreadable: what :meth:`verify` could not decode: index -> file and reason.
        enlarged: indices of pictures seen so far that were smaller than the model's size.
    """

    def __init__(
        self,
        source: Source,
        kind: str,
        preprocessing: Mapping[str, Any],
        classes: int | None,
        id2label: Mapping[int, str] | None = None,
        folders: Mapping[str, int] | None = None,
        ignored: int = 0,
    ):
        self._source = source
        self.labels = source.labels
        self.kind, self.preprocessing = kind, dict(preprocessing)
        self.classes, self.id2label = classes, dict(id2label or {})
        self.folders, self.ignored = dict(folders or {}), ignored
        self.unreadable: dict[int, str] = {}
        self.enlarged: set[int] = getattr(source, "enlarged", set())
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = range(len(self))[int(index)]  # negative ones count from the end, others are an IndexError
        try:
            sample = self._source.read(index)
        except Unreadable as error:
            raise InputError(f"{self._source.name(index)} cannot be read ({error}): remove it") from None
        return {**sample, "labels": self.labels[index]}

    def decode(self, index: int) -> Tensor | str:
        """Pixels [C, H, W]; or the sample's file, and why that cannot be decoded."""
        try:
            return self._source.read(index)["pixel_values"]
        except Unreadable as error:
            return self._described(index, error)

    def _described(self, index: int, why: object) -> str:
        return f"{self._source.name(index)} ({why})"

    # --- What it holds --------------------------------------------------------------------------------------

    @cached_property
    def counts(self) -> dict[int, int]:
        """Class -> number of samples."""
        indices, counts = self.labels.unique(return_counts=True)
        return dict(zip(indices.tolist(), counts.tolist(), strict=True))

    @property
    def mapping(self) -> list[ClassRow]:
        """Index, folder, label text and count of every class that has samples."""
        folder = {index: printable(name) for name, index in self.folders.items()}
        return [ClassRow(i, folder.get(i), self.id2label.get(i), n) for i, n in sorted(self.counts.items())]

    @cached_property
    def _hash(self) -> tuple[str, str]:
        digest = hashlib.sha256(f"{_SIGNATURE}\0{self.kind}\0".encode())
        digest.update(self.labels.numpy().tobytes())
        covers = self._source.digest(digest.update)
        return digest.hexdigest(), covers

    @property
    def sha256(self) -> str:
        """A hash of the data, the same wherever it lies.

        All labels, and for folders the name and size of every file in order; then the content: the whole of it up to
        256 MiB, beyond that an even sample of files (or of an array file's blocks) of about 256 MiB. In a larger data
        set, pixels changed outside that sample without changing a file's size go unnoticed. ``sha256_covers`` says
        which it was.
        """
        return self._hash[0]

    @property
    def sha256_covers(self) -> str:
        return self._hash[1]

    def parse_classes(self, text: str | int | Iterable[str | int]) -> list[int]:
        """``"3, tench"`` -> classes, by index, label text or folder."""
        classes = self.classes if self.classes is not None else int(self.labels.max()) + 1
        return parse_classes(text, classes, label_names(self.id2label, self.folders))

    # --- Before a run ---------------------------------------------------------------------------------------

    def verify(
        self,
        indices: Iterable[int],
        *,
        strict: bool = False,
        progress: Callable[[int, int], None] | None = None,
        workers: int | None = None,
    ) -> list[int]:
        """Decodes these samples and returns those that can be read, each once, in order.

        Others are added to ``unreadable``. Decoded pictures are kept, up to 512 MiB, so that a run decodes them once.

        Args:
            strict: the first unreadable one is an error.
            progress: called with (done, all).
            workers: threads; one per core, at most 8, unless given.

        Raises:
            InputError: strict and one is unreadable; none can be read; an array's values are out of range.
        """
        unique = list(dict.fromkeys(int(i) for i in indices))
        new = [i for i in unique if i not in self._verified and i not in self.unreadable]
        with ThreadPoolExecutor(workers or decoding_threads()) as pool:
            for done, (index, reason) in enumerate(zip(new, pool.map(self._problem, new), strict=True), 1):
                if reason is None:
                    self._verified.add(index)
                else:
                    self.unreadable[index] = self._described(index, reason)
                    if strict:
                        pool.shutdown(cancel_futures=True)
                        break
                if progress is not None:
                    progress(done, len(new))
        bad = [self.unreadable[i] for i in unique if i in self.unreadable]
        if bad and strict:
            raise InputError(f"unreadable image: {bad[0]}: replace or remove it, or leave out strict (--strict)")
        if bad and len(bad) == len(unique):
            raise none_readable(bad)
        return [i for i in unique if i not in self.unreadable]

    def held_bytes(self, count: int) -> int:
        """Of memory that the data take once ``count`` samples are verified: decoded pictures, up to 512 MiB, or arrays
        that are not read from their file row by row."""
        return self._source.held_bytes(count)

    def seconds_each(self, indices: Iterable[int]) -> float:
        """Wall time of decoding one sample as :meth:`verify` does, from decoding these; nothing is kept.

        Unreadable ones take their time as well; 0 without any indices.
        """
        chosen = list(indices)
        if not chosen:
            return 0.0
        self.decode(chosen[0])  # loads the decoder
        with ThreadPoolExecutor(decoding_threads()) as pool:
            started = time.perf_counter()
            list(pool.map(self.decode, chosen))
            return (time.perf_counter() - started) / len(chosen)

    def _problem(self, index: int) -> str | None:
        try:
            self._source.read(index, keep=True)
        except Unreadable as error:
            return str(error)
        return None


def open_data(
    path: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    classes: int | None = None,
    id2label: Mapping[int, str] | None = None,
    class_map: str | Path | Mapping[str, int] | None = None,
    latent_size: int | tuple[int, int] | None = None,
    latent_channels: int | None = None,
    interpolation: str = "bilinear",
) -> ImageData:
    """Opens what a model is to forget from and be reminded of; reads names and labels only.

    A folder holds one folder per class with pictures (png, jpg, jpeg, webp, bmp) at any depth. Its class is given by
    ``class_map``; or by its name, where all folders are called as the model's label texts, or are the numbers of its
    classes; or by sorted order, where ``class_map`` is ``"sorted"``. Pictures are resized on their shorter side and cut
    out of the middle, as diffusers' training scripts do.

    An ``.npz`` or ``.safetensors`` file holds ``labels`` (integers [N]) and one of ``images`` (uint8, or floats in
    [-1, 1]; [N, H, W, C], [N, C, H, W] or [N, H, W]), ``latents`` [N, C, h, w], or ``latent_mean`` and ``latent_std``;
    images must have the model's size already.

    Args:
        size: of the model's images, (height, width) or one side; None where it takes latents only.
        channels: 1 (grey) or 3 (RGB).
        classes: number of the model's real classes; None where there are none: every folder is a class of its own.
        id2label: class -> text.
        latent_size, latent_channels: what latents must have; None where the model takes none.
        interpolation: ``bilinear``, ``bicubic``, ``lanczos`` or ``nearest``.

    Raises:
        InputError: no such data, or data that do not fit the model.
    """
    path = user_path(path).absolute()  # pictures are read when they are used
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    if path.is_dir():
        if size is None or channels is None:
            raise InputError(f"{path} holds pictures, and the model takes latents only: give it latents, or a VAE")
        pictures, folders, ignored = open_folders(
            path, _pair(size), channels, classes, id2label, class_map, interpolation
        )
        return ImageData(
            pictures, "pixel_values", pictures.preprocessing, classes, id2label, folders=folders, ignored=ignored
        )
    if not path.is_file():
        raise InputError(f"there is no data at {path}")
    if class_map is not None:
        raise InputError(f"a class map is for folders, and {path} has its own labels: leave it out")
    source, kind = open_arrays(
        path,
        None if size is None else _pair(size),
        channels,
        classes,
        None if latent_size is None else _pair(latent_size),
        latent_channels,
    )
    return ImageData(source, kind, source.preprocessing, classes, id2label)


def none_readable(images: Sequence[str]) -> InputError:
    return InputError(f"none of {len(images)} images can be read, the first is {images[0]}: check the data")


def count_classes(path: str | Path) -> int:
    """Class folders, or different labels of an array file, of what :func:`open_data` would open.

    Raises:
        InputError: there are no class folders or labels.
    """
    path = user_path(path)
    if path.is_dir():
        return len(class_folders(path)[0])
    return len(array_labels(path, read_arrays(path)).all().unique())


def decoding_threads() -> int:
    return min(8, os.cpu_count() or 1)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
