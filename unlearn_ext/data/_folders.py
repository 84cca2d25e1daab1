"""One folder of pictures for each class. PIL is needed when the first is decoded."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ._assigning import assign_classes
from ._source import HASHED_BYTES, Unreadable, as_pixels
from .labels import printable

__all__ = ["KEPT_BYTES", "Folders", "class_folders", "open_folders"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Whatever the name says, nothing else is opened: an icon may hold a picture far larger than its header says, and
# PostScript is a program.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
KEPT_BYTES = 512 << 20  # of decoded pictures, where they are to be kept
MOST_PIXELS = 89_478_485  # of a picture: where PIL begins to warn, which a process may have switched off
_LARGE = 1 << 24  # pixels: larger ones are decoded one at a time, whatever the number of threads
# What archives, servers and file systems put beside pictures; hidden folders are passed over as well.
_NOT_OF_THE_DATA = ("__MACOSX", "@eaDir", "lost+found")
_decoding_a_large_one = threading.Lock()


def open_folders(
    path: Path,
    size: tuple[int, int],
    channels: int,
    classes: int | None,
    id2label: Mapping[int, str] | None,
    class_map: str | Path | Mapping[str, int] | None,
    interpolation: str,
) -> tuple[Folders, dict[str, int], int]:
    """The pictures, folder -> class, and how many files are none of them."""
    if channels not in (1, 3):
        raise InputError(f"pictures have 1 or 3 channels, and the model takes {channels}: give it arrays")
    names, ignored = class_folders(path)
    folders = assign_classes(path, names, classes, id2label, class_map)
    files: list[str] = []
    labels: list[int] = []
    for name, index in sorted(folders.items(), key=lambda item: item[1]):
        pictures, others = _pictures(path, name)
        if not pictures:
            raise InputError(f"the class folder {path / name} has no images ({', '.join(SUFFIXES)}): fill or remove it")
        files += pictures
        labels += [index] * len(pictures)
        ignored += others
    source = Folders(path, files, torch.tensor(labels, dtype=torch.int64, device="cpu"), size, channels, interpolation)
    return source, folders, ignored


def class_folders(path: Path) -> tuple[list[str], int]:
    """Names, sorted, and how many other entries there are."""
    entries = [entry for entry in _entries(path) if not _is_passed_over(entry.name)]
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise InputError(f"{path} has no class folders: put the images of each class into a folder of its own")
    places: dict[str, str] = {}
    for name in names:
        real = os.path.realpath(path / name)
        if real in places:
            raise InputError(
                f"the class folders {places[real]!r} and {name!r} of {path} are links to the same images: keep one"
            )
        places[real] = name
    return names, len(entries) - len(names)


def _pictures(root: Path, name: str) -> tuple[list[str], int]:
    """Paths relative to ``root``, sorted, and how many other files there are."""
    pictures: list[str] = []
    others = 0
    seen: set[str] = set()  # links may lead in circles
    pending = [root / name]
    while pending:
        folder = pending.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        for entry in _entries(folder):
            if _is_folder(entry):
                if not _is_passed_over(entry.name):
                    pending.append(Path(entry.path))
            elif _is_picture(entry):
                pictures.append(os.path.relpath(entry.path, root))
            else:
                others += 1
    return sorted(pictures), others


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror or error}): check who may read it") from None


def _is_picture(entry: os.DirEntry[str]) -> bool:
    """By its name. A link to nothing is one, which cannot be read; a pipe would be waited on for ever."""
    if entry.name.startswith(".") or not entry.name.lower().endswith(SUFFIXES):
        return False
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # a link to itself
        return True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_passed_over(name: str) -> bool:
    return name.startswith(".") or name in _NOT_OF_THE_DATA


class Folders:
    """Pictures in files."""

    def __init__(
        self,
        root: Path,
        files: list[str],
        labels: Tensor,
        size: tuple[int, int],
        channels: int,
        interpolation: str,
    ):
        self.root, self.files, self.labels = root, files, labels
        self.size, self.mode, self.interpolation = size, {1: "L", 3: "RGB"}[channels], interpolation
        self.enlarged: set[int] = set()
        self._kept: dict[int, np.ndarray] = {}
        self._kept_bytes = 0

    @property
    def preprocessing(self) -> dict[str, Any]:
        return {
            "orientation": "EXIF",
            "mode": self.mode,
            "resize": f"shorter side to the model's, {self.interpolation}, antialiased",
            "crop": "center",
            "size": list(self.size),
            "range": [-1, 1],
        }

    def name(self, index: int) -> str:
        return printable(str(self.root / self.files[index]))

    def read(self, index: int, keep: bool = False) -> dict[str, Tensor]:
        pixels = self._kept.get(index)
        if pixels is None:
            pixels = self._decode(index)
            if keep and self._kept_bytes + pixels.nbytes <= KEPT_BYTES:
                self._kept[index] = pixels
                self._kept_bytes += pixels.nbytes
        return {"pixel_values": as_pixels(torch.from_numpy(pixels))}

    def held_bytes(self, count: int) -> int:
        each = len(self.mode) * self.size[0] * self.size[1]  # L or RGB, a byte for each letter
        return min(count, KEPT_BYTES // each) * each

    def _decode(self, index: int) -> np.ndarray:
        """uint8 [C, H, W]"""
        from PIL import UnidentifiedImageError

        Image, _ = _pil()
        try:
            if not os.path.isfile(self.root / self.files[index]):
                raise Unreadable("there is no such file")
            with Image.open(self.root / self.files[index], formats=_FORMATS) as image:
                self._check(image)
                large = image.width * image.height > _LARGE
                with _decoding_a_large_one if large else contextlib.nullcontext():
                    return self._cut(index, image)
        except Unreadable:
            raise
        except UnidentifiedImageError:
            raise Unreadable(f"it is damaged or no picture of {', '.join(_FORMATS)}") from None
        except Exception as error:  # a damaged file makes PIL's decoders raise nearly anything
            raise Unreadable(f"{type(error).__name__}: {error}".splitlines()[0]) from None

    def _check(self, image: Any) -> None:
        """What the header says, before memory is asked for."""
        if image.mode.startswith(("I", "F")):
            raise Unreadable(f"its pixels are of mode {image.mode}, not of 8 bits")
        if min(image.size) == 0:
            raise Unreadable("it has no pixels")
        width, height = self._resized(*image.size)
        for what, pixels in (("it has", image.width * image.height), ("resized it would have", width * height)):
            if pixels > MOST_PIXELS:
                raise Unreadable(f"{what} {pixels:,} pixels, and {MOST_PIXELS:,} are the most: make it smaller")

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of a picture whose shorter side is the model's."""
        if width * self.size[0] >= height * self.size[1]:
            return width * self.size[0] // height, self.size[0]
        return self.size[1], height * self.size[1] // width

    def _cut(self, index: int, image: Any) -> np.ndarray:
        """Turned upright, resized, and cut out of the middle."""
        Image, ImageOps = _pil()
        ImageOps.exif_transpose(image, in_place=True)  # by default a copy, even of an upright one
        if image.mode != self.mode:
            image = image.convert(self.mode)
        height, width = self.size
        if image.height < height or image.width < width:
            self.enlarged.add(index)
        resized = self._resized(*image.size)
        if resized != image.size:
            image = image.resize(resized, getattr(Image.Resampling, self.interpolation.upper()))
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
        pixels = np.array(image, dtype=np.uint8)
        return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def digest(self, update: Callable[[bytes], None]) -> str:
        sizes = []
        for file in self.files:
            try:
                sizes.append(os.stat(self.root / file).st_size)
            except OSError:  # a dangling link is found by verify()
                sizes.append(-1)
            update(os.fsencode(Path(file).as_posix()) + f"\0{sizes[-1]}\0".encode())
        total = sum(sizes)
        taken = range(len(sizes))
        if total > HASHED_BYTES:
            part = max(1, len(sizes) * HASHED_BYTES // total)
            taken = [i * len(sizes) // part for i in range(part)]
        for i in taken:
            try:
                update(hashlib.sha256((self.root / self.files[i]).read_bytes()).digest())
            except OSError:
                update(b"unreadable")
        return f"names and sizes of {len(sizes)} files, content of {len(taken)}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_kept_bytes": 0}  # workers need not be sent the pictures


def _pil() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ImportError('Pictures need PIL, which is not installed: pip install "unlearn_ext[diffusion]"') from None
    return Image, ImageOps
