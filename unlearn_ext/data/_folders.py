"""One folder of pictures for each class. PIL is needed when the first is decoded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ._source import HASHED_BYTES, Unreadable, as_pixels, known_classes
from .labels import label_names, read_class_map

__all__ = ["KEPT_BYTES", "Folders", "class_folders", "open_folders"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
KEPT_BYTES = 512 << 20  # of decoded pictures, where they are to be kept


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
    folders = _assign(path, names, classes, id2label, class_map)
    files: list[str] = []
    labels: list[int] = []
    for name, index in sorted(folders.items(), key=lambda item: item[1]):
        own, others = _pictures(path, name)
        if not own:
            raise InputError(f"the class folder {path / name} has no images ({', '.join(SUFFIXES)}): fill or remove it")
        files += own
        labels += [index] * len(own)
        ignored += others
    source = Folders(path, files, torch.tensor(labels, dtype=torch.int64, device="cpu"), size, channels, interpolation)
    return source, folders, ignored


def class_folders(path: Path) -> tuple[list[str], int]:
    """Names, sorted, and how many other entries there are."""
    entries = [entry for entry in os.scandir(path) if not entry.name.startswith(".")]
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise InputError(f"{path} has no class folders: put the images of each class into a folder of its own")
    return names, len(entries) - len(names)


def _assign(
    path: Path,
    names: list[str],
    classes: int | None,
    id2label: Mapping[int, str] | None,
    class_map: str | Path | Mapping[str, int] | None,
) -> dict[str, int]:
    """Folder -> class."""
    texts = label_names(id2label)
    if class_map is not None:
        given = dict(class_map) if isinstance(class_map, Mapping) else read_class_map(class_map, texts)
        for name in names:
            if name not in given:
                raise InputError(f"the class map does not name the folder {name!r} of {path}: add it, or move it away")
        folders = {name: given[name] for name in names}
        for name, index in folders.items():
            if index < 0 or (classes is not None and index >= classes):
                limits = "classes are counted from 0" if classes is None else known_classes(classes)
                raise InputError(f"the class map gives {name!r} the class {index}: {limits}")
        return folders
    if classes is not None and len(names) != classes:
        raise InputError(
            f"{path} has {len(names)} class folders and the model {classes} classes: say which folder is which class "
            "with a class map (--class-map)"
        )
    if all(name.isdecimal() for name in names):  # "10" stands after "9", not after "1"
        names = sorted(names, key=int)
        if classes is not None and [int(name) for name in names] != list(range(classes)):
            raise InputError(
                f"the folders of {path} are numbers, but not 0 to {classes - 1}: say which folder is which class with "
                "a class map (--class-map)"
            )
    folders = {name: index for index, name in enumerate(names)}
    for name, index in folders.items():
        meant = texts.get(name.lower(), [index])
        if index not in meant:
            raise InputError(
                f"the folder {name!r} would be class {index} by sorted order, and the model calls class {meant[0]} "
                "so: give a class map (--class-map)"
            )
    return folders


def _pictures(root: Path, name: str) -> tuple[list[str], int]:
    """Paths relative to ``root``, sorted, and how many other files there are."""
    found: list[str] = []
    others = 0
    seen: set[str] = set()  # links may lead in circles
    for folder, below, files in os.walk(root / name, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(entry for entry in below if not entry.startswith("."))
        for file in files:
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                found.append(os.path.relpath(os.path.join(folder, file), root))
            else:
                others += 1
    return sorted(found), others


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
        return str(self.root / self.files[index])

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
        Image, ImageOps = _pil()
        try:
            with Image.open(self.root / self.files[index]) as image:
                if image.mode.startswith(("I", "F")):
                    raise Unreadable(f"its pixels are of mode {image.mode}, not of 8 bits")
                image = ImageOps.exif_transpose(image).convert(self.mode)
        except Unreadable:
            raise
        except Exception as error:  # a damaged file makes PIL's decoders raise nearly anything
            raise Unreadable(f"{type(error).__name__}: {error}".splitlines()[0]) from None
        height, width = self.size
        if image.height < height or image.width < width:
            self.enlarged.add(index)
        if image.width * height >= image.height * width:
            resized = image.width * height // image.height, height
        else:
            resized = width, image.height * width // image.width
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
