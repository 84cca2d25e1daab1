"""A user's data for diffusion: one folder per class, or arrays of images or latents in .npz and safetensors files.

Nothing is decoded until it is asked for. PIL is needed for pictures only.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from .labels import label_names, parse_classes, read_class_map

__all__ = ["ClassRow", "ImageData", "count_classes", "open_data"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
HASHED_BYTES = 256 << 20  # of content that goes into a hash; beyond it, an even sample
KEPT_BYTES = 512 << 20  # of pictures that verify() has decoded and keeps
INTERPOLATIONS = ("bilinear", "bicubic", "lanczos", "nearest")

_KEYS = ("images", "latents", "latent_mean", "latent_std", "labels")
_KINDS = {"images": "pixel_values", "latents": "latents", "latent_mean": "latent_moments"}
_ROWS_LOOKED_AT = 64  # of a float array, when it is opened
_LARGEST_PIXEL = 1.001  # float16 and resampling round
_SIGNATURE = "unlearn_ext.data.1"


class ClassRow(NamedTuple):
    """One line of the mapping that is printed before a run."""

    index: int
    folder: str | None
    text: str | None
    count: int


class _Source(Protocol):
    """Where raw samples come from."""

    labels: Tensor

    def read(self, index: int, keep: bool = False) -> dict[str, Tensor]:
        """The sample's tensors, float32; ``keep`` what was decoded for the next time."""

    def name(self, index: int) -> str: ...

    def held_bytes(self, count: int) -> int:
        """In memory, once ``count`` samples have been read and kept."""

    def digest(self, update: Callable[[bytes], None]) -> str:
        """Feeds what identifies the data and says in words what that is."""


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
        enlarged: pictures seen so far that were smaller than the model's size.
    """

    def __init__(
        self,
        source: _Source,
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
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = range(len(self))[int(index)]  # negative ones count from the end, others are an IndexError
        try:
            sample = self._source.read(index)
        except _Unreadable as error:
            raise InputError(f"{self._source.name(index)} cannot be read ({error}): remove it") from None
        return {**sample, "labels": self.labels[index]}

    def decode(self, index: int) -> Tensor | str:
        """Pixels [C, H, W]; or the sample's file, and why that cannot be decoded."""
        try:
            return self._source.read(index)["pixel_values"]
        except _Unreadable as error:
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
        folder = {index: name for name, index in self.folders.items()}
        return [ClassRow(i, folder.get(i), self.id2label.get(i), n) for i, n in sorted(self.counts.items())]

    @property
    def enlarged(self) -> int:
        return len(getattr(self._source, "enlarged", ()))

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
        wanted = list(dict.fromkeys(int(i) for i in indices))
        new = [i for i in wanted if i not in self._verified and i not in self.unreadable]
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
        bad = [self.unreadable[i] for i in wanted if i in self.unreadable]
        if bad and strict:
            raise unreadable(bad[0])
        if bad and len(bad) == len(wanted):
            raise none_readable(bad)
        return [i for i in wanted if i not in self.unreadable]

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
        except _Unreadable as error:
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
    ``class_map``, or by sorted order if there are as many folders as the model has classes. Pictures are resized on
    their shorter side and cut out of the middle, as diffusers' training scripts do.

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
    path = Path(path)
    if interpolation not in INTERPOLATIONS:
        raise InputError(f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
    if path.is_dir():
        if size is None or channels is None:
            raise InputError(f"{path} holds pictures, and the model takes latents only: give it latents, or a VAE")
        return _open_folders(path, _pair(size), channels, classes, id2label, class_map, interpolation)
    if not path.is_file():
        raise InputError(f"there is no data at {path}")
    if class_map is not None:
        raise InputError(f"a class map is for folders, and {path} has its own labels: leave it out")
    return _open_arrays(
        path,
        _arrays(path),
        None if size is None else _pair(size),
        channels,
        classes,
        id2label,
        None if latent_size is None else _pair(latent_size),
        latent_channels,
    )


def unreadable(image: str) -> InputError:
    return InputError(f"unreadable image: {image}: replace or remove it, or leave out strict (--strict)")


def none_readable(images: Sequence[str]) -> InputError:
    return InputError(f"none of {len(images)} images can be read, the first is {images[0]}: check the data")


def count_classes(path: str | Path) -> int:
    """Class folders, or different labels of an array file, of what :func:`open_data` would open.

    Raises:
        InputError: there are no class folders or labels.
    """
    path = Path(path)
    if path.is_dir():
        return len(_class_folders(path)[0])
    return len(_array_labels(path, _arrays(path)).all().unique())


def decoding_threads() -> int:
    return min(8, os.cpu_count() or 1)


def _arrays(path: Path) -> dict[str, _Array]:
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".safetensors"):
        raise InputError(f"{path}: expected a folder with one folder per class, a .npz or a .safetensors file")
    return _npz_arrays(path) if suffix == ".npz" else _safetensors_arrays(path)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


class _Unreadable(Exception):
    """A picture that cannot be decoded, and why."""


# --- Folders ------------------------------------------------------------------------------------------------


def _open_folders(
    path: Path,
    size: tuple[int, int],
    channels: int,
    classes: int | None,
    id2label: Mapping[int, str] | None,
    class_map: str | Path | Mapping[str, int] | None,
    interpolation: str,
) -> ImageData:
    if channels not in (1, 3):
        raise InputError(f"pictures have 1 or 3 channels, and the model takes {channels}: give it arrays")
    names, ignored = _class_folders(path)
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
    source = _Folders(path, files, torch.tensor(labels, dtype=torch.int64), size, channels, interpolation)
    return ImageData(source, "pixel_values", source.preprocessing, classes, id2label, folders, ignored)


def _class_folders(path: Path) -> tuple[list[str], int]:
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
                limits = "classes are counted from 0" if classes is None else _classes(classes)
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


def _classes(classes: int) -> str:
    return f"the model has {classes} classes (0 to {classes - 1})"


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


class _Folders:
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
        return {"pixel_values": _as_pixels(torch.from_numpy(pixels))}

    def held_bytes(self, count: int) -> int:
        each = len(self.mode) * self.size[0] * self.size[1]  # L or RGB, a byte for each letter
        return min(count, KEPT_BYTES // each) * each

    def _decode(self, index: int) -> np.ndarray:
        """uint8 [C, H, W]"""
        Image, ImageOps = _pil()
        try:
            with Image.open(self.root / self.files[index]) as image:
                if image.mode.startswith(("I", "F")):
                    raise _Unreadable(f"its pixels are of mode {image.mode}, not of 8 bits")
                image = ImageOps.exif_transpose(image).convert(self.mode)
        except _Unreadable:
            raise
        except Exception as error:  # a damaged file makes PIL's decoders raise nearly anything
            raise _Unreadable(f"{type(error).__name__}: {error}".splitlines()[0]) from None
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


def _as_pixels(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], to the bit what torchvision's ToTensor and Normalize(0.5, 0.5) give."""
    return pixels.to(torch.float32).div_(255).sub_(0.5).div_(0.5)


# --- Arrays -------------------------------------------------------------------------------------------------


class _Array(Protocol):
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int  # in memory

    def row(self, index: int) -> Tensor: ...

    def all(self) -> Tensor: ...


class _NumpyArray:
    def __init__(self, array: np.ndarray):
        self._array = array
        self.shape = tuple(array.shape)
        self.dtype = torch.from_numpy(np.zeros(1, array.dtype)).dtype
        self.nbytes = array.nbytes if getattr(array, "filename", None) is None else 0  # else it is mapped

    def row(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self._array[index]))

    def all(self) -> Tensor:
        return torch.from_numpy(np.array(self._array))


class _SafetensorsArray:
    nbytes = 0

    def __init__(self, path: Path, key: str):
        self._path, self._key, self._slice = path, key, None
        self.shape = tuple(self._open().get_shape())
        empty = self._open()[:0] if self.shape else self.all()
        self.dtype = empty.dtype

    def _open(self) -> Any:
        if self._slice is None:
            from safetensors import safe_open

            self._slice = safe_open(self._path, framework="pt").get_slice(self._key)
        return self._slice

    def row(self, index: int) -> Tensor:
        return self._open()[index : index + 1][0].clone()

    def all(self) -> Tensor:
        return self._open()[...].clone()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slice": None}


def _npz_arrays(path: Path) -> dict[str, _Array]:
    """Members of an archive; those stored without compression (as np.savez does) are mapped, not read."""
    arrays: dict[str, _Array] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                key = info.filename.removesuffix(".npy")
                if key not in _KEYS:
                    continue
                with archive.open(info) as member:
                    version = np.lib.format.read_magic(member)
                    read_header = {
                        (1, 0): np.lib.format.read_array_header_1_0,
                        (2, 0): np.lib.format.read_array_header_2_0,
                    }[version]
                    shape, fortran, dtype = read_header(member)
                    start = member.tell()
                    if dtype.hasobject:
                        raise InputError(f"{path}: {key} holds pickled objects, which may run code: save plain numbers")
                    if dtype.kind not in "uif":
                        raise InputError(f"{path}: {key} has the dtype {dtype}: save plain numbers")
                    if info.compress_type != zipfile.ZIP_STORED or 0 in shape:
                        member.seek(0)
                        array = np.lib.format.read_array(member, allow_pickle=False)
                    else:
                        offset = _data_offset(path, info) + start
                        array = np.memmap(path, dtype, "r", offset, shape, order="F" if fortran else "C")
                native = array.dtype.newbyteorder("=")
                arrays[key] = _NumpyArray(array if array.dtype == native else array.astype(native))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(f"{path} is not a whole .npz file ({error})") from None
    return arrays


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: after its local header, which is not as long as the directory's."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        name, extra = struct.unpack("<HH", file.read(30)[26:])
    return info.header_offset + 30 + name + extra


def _safetensors_arrays(path: Path) -> dict[str, _Array]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key in _KEYS]  # noqa: SIM118 - not a dict
        return {key: _SafetensorsArray(path, key) for key in keys}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a safetensors file ({error})") from None


def _open_arrays(
    path: Path,
    arrays: Mapping[str, _Array],
    size: tuple[int, int] | None,
    channels: int | None,
    classes: int | None,
    id2label: Mapping[int, str] | None,
    latent_size: tuple[int, int] | None,
    latent_channels: int | None,
) -> ImageData:
    found = [key for key in _KINDS if key in arrays]
    if len(found) != 1:
        got = f"it holds {' and '.join(found)}" if found else "it holds none of them"
        raise InputError(f"{path}: expected one of images, latents, or latent_mean with latent_std; {got}")
    if ("latent_mean" in arrays) != ("latent_std" in arrays):
        raise InputError(f"{path}: latent_mean needs latent_std beside it")
    labels, main = _array_labels(path, arrays), arrays[found[0]]
    if not main.shape or main.shape[0] == 0:
        raise InputError(f"{path} has no samples")
    if labels.shape[0] != main.shape[0]:
        raise InputError(f"{path} has {main.shape[0]} samples and {labels.shape[0]} labels: they must pair up")
    values = labels.all().to(torch.int64)
    for label in (int(values.min()), int(values.max())):
        if label < 0 or (classes is not None and label >= classes):
            limits = "labels are counted from 0" if classes is None else _classes(classes)
            raise InputError(f"{path} has the label {label}: {limits}")
    if found[0] == "images":
        if size is None or channels is None:
            raise InputError(f"{path} holds images, and the model takes latents only: give it latents, or a VAE")
        source: _Source = _Images(path, main, values, size, channels)
    else:
        if latent_size is None or latent_channels is None:
            raise InputError(f"{path} holds latents, and the model takes images: give it images")
        parts = {key: arrays[key] for key in ("latents", "latent_mean", "latent_std") if key in arrays}
        source = _Latents(path, parts, values, (latent_channels, *latent_size))
    return ImageData(source, _KINDS[found[0]], source.preprocessing, classes, id2label)


def _array_labels(path: Path, arrays: Mapping[str, _Array]) -> _Array:
    if "labels" not in arrays:
        raise InputError(f"{path} has no labels: add an array of integers, one for each sample")
    labels = arrays["labels"]
    if labels.dtype.is_floating_point or len(labels.shape) != 1:
        raise InputError(f"{path}: labels: expected integers of shape [N], got {labels.dtype} {list(labels.shape)}")
    return labels


class _ArrayFile:
    path: Path
    labels: Tensor
    _parts: dict[str, _Array]

    def held_bytes(self, count: int) -> int:
        return sum(array.nbytes for array in self._parts.values())

    def name(self, index: int) -> str:
        return f"sample {index} of {self.path}"

    def digest(self, update: Callable[[bytes], None]) -> str:
        size = self.path.stat().st_size
        update(f"{size}\0".encode())
        with open(self.path, "rb") as file:
            if size <= HASHED_BYTES:
                while block := file.read(1 << 20):
                    update(block)
                return "the whole file"
            blocks, length = 1024, HASHED_BYTES // 1024
            for i in range(blocks):
                file.seek(i * (size - length) // (blocks - 1))
                update(file.read(length))
        return f"the file's size and {blocks} of its blocks, {HASHED_BYTES} bytes in all"


class _Images(_ArrayFile):
    def __init__(self, path: Path, array: _Array, labels: Tensor, size: tuple[int, int], channels: int):
        self.path, self._array, self.labels = path, array, labels
        self._parts = {"images": array}
        shape = array.shape[1:]
        wanted = {"chw": (channels, *size), "hwc": (*size, channels)}
        if channels == 1:
            wanted["hw"] = size
        self._order = next((order for order, expected in wanted.items() if shape == expected), None)
        if self._order is None:
            raise InputError(
                f"{path} has images of shape {list(shape)}, and the model takes {list(wanted['chw'])} or "
                f"{list(wanted['hwc'])}: resize them, or give pictures in class folders, which are resized"
            )
        self._bytes = array.dtype == torch.uint8
        if not self._bytes:
            if not array.dtype.is_floating_point:
                raise InputError(f"{path}: images: expected uint8, or floats in [-1, 1], got {array.dtype}")
            count = array.shape[0]
            looked = min(count, _ROWS_LOOKED_AT)
            rows = [self.read(i * count // looked)["pixel_values"] for i in range(looked)]
            if min(float(row.min()) for row in rows) >= 0:
                raise InputError(f"{path} has no pixel below 0: floats must be in [-1, 1]; scale them by 2 x - 1")

    @property
    def preprocessing(self) -> dict[str, Any]:
        return {"scale": "2 x / 255 - 1" if self._bytes else "none", "order": self._order, "range": [-1, 1]}

    def read(self, index: int, keep: bool = False) -> dict[str, Tensor]:
        row = self._array.row(index)
        if self._order == "hwc":
            row = row.permute(2, 0, 1).contiguous()
        elif self._order == "hw":
            row = row[None]
        if self._bytes:
            return {"pixel_values": _as_pixels(row)}
        row = row.to(torch.float32)
        if not bool(row.isfinite().all()) or float(row.abs().max()) > _LARGEST_PIXEL:
            raise InputError(
                f"{self.name(index)} has pixels from {float(row.min()):g} to {float(row.max()):g}: floats must be in "
                "[-1, 1]; save bytes as uint8"
            )
        return {"pixel_values": row}


class _Latents(_ArrayFile):
    def __init__(self, path: Path, parts: Mapping[str, _Array], labels: Tensor, shape: tuple[int, ...]):
        self.path, self._parts, self.labels = path, dict(parts), labels
        for key, array in parts.items():
            if array.shape[1:] != shape or array.shape[0] != len(labels):
                raise InputError(f"{path} has {key} of shape {list(array.shape)}: expected {[len(labels), *shape]}")
            if not array.dtype.is_floating_point:
                raise InputError(f"{path}: {key}: expected floats, got {array.dtype}")

    @property
    def preprocessing(self) -> dict[str, Any]:
        return {"scale": "none: the VAE's scaling factor is not applied"}

    def read(self, index: int, keep: bool = False) -> dict[str, Tensor]:
        sample = {key: array.row(index).to(torch.float32) for key, array in self._parts.items()}
        for key, value in sample.items():
            if not bool(value.isfinite().all()):
                raise InputError(f"{self.name(index)} has inf or NaN in {key}")
            if key == "latent_std" and float(value.min()) < 0:
                raise InputError(f"{self.name(index)} has a negative latent_std: give deviations, not log-variances")
        return sample
