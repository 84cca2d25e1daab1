"""Latents of the images that a run will use, encoded once."""

from __future__ import annotations

import fnmatch
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..distributed.hashing import weights_hash
from ..distributed.modes import evaluating
from ..errors import InputError, first_line
from ..utils.arguments import check_count
from ..utils.files import atomic_path, writable_directory
from ..utils.json_files import read_json
from ..utils.reading import explain_open_errors, names_in
from .images import ImageData, decoding_threads, none_readable

__all__ = [
    "ENCODED_AT_ONCE",
    "SHARD_BYTES",
    "LatentData",
    "encode_batch",
    "encode_latents",
    "latents_size",
]

ENCODED_AT_ONCE = 8
SHARD_BYTES = 256 << 20

_FORMAT = "unlearn_ext.latents.1"
_MANIFEST = "manifest.json"
_LARGEST_MANIFEST = 1 << 30  # bytes: it names each sample
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


class LatentData(Dataset):
    """Latents on disk: ``latent_mean`` and ``latent_std`` float32 [C, h, w] and an int64 label for each sample.

    A latent is mean + std * noise; the VAE's ``scaling_factor`` is not applied.

    Attributes:
        labels, indices: int64 [N]: classes, and where the samples stand in the data they were encoded from.
        scaling_factor: of the VAE's configuration.
        manifest: what ``manifest.json`` holds.
    """

    kind = "latent_moments"

    def __init__(self, shards: Sequence[Path], rows: Tensor, labels: Tensor, indices: Tensor, manifest: dict[str, Any]):
        self._shards, self._rows = list(shards), rows  # rows: [N, 2], shard and row in it
        self.labels, self.indices, self.manifest = labels, indices, manifest
        self._open: dict[int, tuple[Any, Any]] = {}
        self._positions: dict[int, int] | None = None

    @property
    def scaling_factor(self) -> float:
        return self.manifest["scaling_factor"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        position = range(len(self))[int(position)]
        shard, row = self._rows[position].tolist()
        if shard not in self._open:
            from safetensors import safe_open

            with explain_open_errors(self._shards[shard]):
                file = safe_open(self._shards[shard], framework="pt")
            self._open[shard] = file.get_slice("latent_mean"), file.get_slice("latent_std")
        mean, std = (part[row : row + 1][0].to(torch.float32, copy=True) for part in self._open[shard])
        return {"latent_mean": mean, "latent_std": std, "labels": self.labels[position]}

    def positions(self, indices: Tensor) -> Tensor:
        """Where samples stand here, by their indices in the data they were encoded from; any shape."""
        if self._positions is None:
            self._positions = {index: i for i, index in enumerate(self.indices.tolist())}
        try:
            positions = [self._positions[index] for index in indices.flatten().tolist()]
        except KeyError as error:
            raise InputError(f"sample {error} has not been encoded: encode the indices that the run will use") from None
        return torch.tensor(positions, dtype=torch.int64, device="cpu").view(indices.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def encode_latents(
    dataset: ImageData,
    indices: Iterable[int] | Tensor,
    vae: nn.Module,
    directory: str | Path,
    *,
    batch_size: int = ENCODED_AT_ONCE,
    shard_bytes: int = SHARD_BYTES,
    dtype: str | torch.dtype = "float32",
    skip_unreadable: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LatentData:
    """Encodes the chosen images through the VAE, each once, into safetensors shards.

    What stands in ``directory`` already is used, and only missing images are decoded and encoded: a run that was
    killed goes on behind its last whole shard, and another run on the same data adds what it lacks. Encoding is in
    evaluation mode, in the VAE's own dtype, and without autocast. One process writes at a time.

    Args:
        dataset: gives ``pixel_values``.
        indices: into the dataset; one that is named twice is encoded once.
        vae: an ``AutoencoderKL``, or what else has ``encode(x).latent_dist`` with ``mean`` and ``std``.
        directory: created; one directory holds one VAE and one data set.
        batch_size: images encoded at once.
        shard_bytes: at most so large is a file, unless a single image is larger.
        dtype: of the files, ``float32`` or ``float16``.
        skip_unreadable: images that cannot be decoded are added to ``dataset.unreadable`` and left out.
        progress: called with (done, all) after every batch.

    Returns:
        A data set in the order of ``indices``.

    Raises:
        InputError: the directory holds latents of another VAE, other data, another preprocessing or dtype; an image
            cannot be decoded, or none can; the VAE returns inf or NaN.
    """
    for name, value in (("batch_size", batch_size), ("shard_bytes", shard_bytes)):
        check_count(name, value)
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise InputError(f"dtype: expected float32 or float16, got {dtype}")
    if dataset.kind != "pixel_values":
        raise InputError("the data are latents already: they need no VAE")
    chosen = _check_indices(dataset, indices)
    encoding = _Encoding(dataset, chosen, vae, writable_directory(directory), dtype, skip_unreadable)
    encoding.encode(batch_size, shard_bytes, progress or (lambda done, total: None))
    readable = [index for index in chosen if str(index) not in encoding.unreadable]
    if not readable:
        raise none_readable([encoding.unreadable[str(index)] for index in dict.fromkeys(chosen)])
    rows = torch.tensor([encoding.where[index] for index in readable], dtype=torch.int64, device="cpu")
    samples = torch.tensor(readable, dtype=torch.int64, device="cpu")
    return LatentData(encoding.shards, rows, dataset.labels[samples], samples, encoding.manifest)


def _check_indices(dataset: ImageData, indices: Iterable[int] | Tensor) -> list[int]:
    chosen = indices if isinstance(indices, Tensor) else list(indices)
    chosen = torch.as_tensor(chosen, dtype=torch.int64, device="cpu").flatten().tolist()
    if not chosen:
        raise InputError("no images were chosen to be encoded")
    if min(chosen) < 0 or max(chosen) >= len(dataset):
        raise InputError(f"indices: expected 0 to {len(dataset) - 1}, got {min(chosen)} to {max(chosen)}")
    return chosen


class _Encoding:
    """A directory of latents to which the missing ones of some samples are added; its manifest is written at once.

    Attributes:
        shards: the files, in order.
        where: sample -> number of its shard, and its row there.
        unreadable: of the manifest: sample, as text -> why it has no latents.
        missing: samples that are to be encoded.
    """

    def __init__(
        self,
        dataset: ImageData,
        indices: Iterable[int],
        vae: nn.Module,
        directory: Path,
        dtype: str,
        skip_unreadable: bool,
    ):
        self.dataset, self.vae, self.directory = dataset, vae, directory
        self.dtype, self.skip_unreadable = dtype, skip_unreadable
        self.manifest: dict[str, Any] = {
            "format": _FORMAT,
            "vae_hash": weights_hash(vae.state_dict().items()),
            "data_hash": dataset.sha256,
            "data_hash_covers": dataset.sha256_covers,
            "preprocessing": dataset.preprocessing,
            "dtype": dtype,
            "scaling_factor": float(getattr(getattr(vae, "config", None), "scaling_factor", None) or 1.0),
            "unreadable": {},
            "enlarged": [],
        }
        old = _read_manifest(directory)
        if old is not None:
            _check_manifest(directory, old, self.manifest)
        self.shards, self.where = _read_shards(directory)
        unique = list(dict.fromkeys(indices))
        self.unreadable: dict[str, str] = self.manifest["unreadable"]
        if skip_unreadable:  # else they are tried again, and named
            self.unreadable.update((old or {}).get("unreadable", {}))
            known = {index: self.unreadable[str(index)] for index in unique if str(index) in self.unreadable}
            dataset.unreadable.update(known)
        self.enlarged = set((old or {}).get("enlarged", ()))
        dataset.enlarged.update(self.enlarged.intersection(unique))
        self.manifest["enlarged"] = sorted(self.enlarged)
        self.missing = [index for index in unique if index not in self.where and str(index) not in self.unreadable]
        self.manifest["indices"] = list(dict.fromkeys([*(old or {}).get("indices", []), *unique]))
        # First, so that every shard is accounted for by the manifest.
        _write_manifest(directory, self.manifest)
        self._noted = len(self.unreadable), len(self.enlarged)

    def encode(self, batch_size: int, shard_bytes: int, progress: Callable[[int, int], None]) -> None:
        """Encodes what is missing."""
        missing, pending, done = self.missing, [], 0
        # Shards hold whole batches, so that a run that goes on after a kill encodes the very same batches.
        batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
        for batch, samples in zip(batches, _decoded(self.dataset, batches), strict=True):
            done += len(batch)
            pixels = self._readable(batch, samples)
            if pixels:
                indices, images = list(pixels), torch.stack(list(pixels.values()))
                pending.append(encode_batch(self.vae, images, indices, _DTYPES[self.dtype]))
            # The next batch may be whole where this one was not.
            at_end = done == len(missing)
            if pending and (at_end or sum(map(_bytes, pending)) + batch_size * _row(pending) > shard_bytes):
                self._add_shard(pending)
                pending = []
            progress(done, len(missing))
        self._note()

    def _readable(self, batch: Sequence[int], samples: Sequence[Tensor | str]) -> dict[int, Tensor]:
        """Pixels by sample; what cannot be decoded is refused, or noted."""
        pixels = {}
        for index, sample in zip(batch, samples, strict=True):
            if not isinstance(sample, str):
                pixels[index] = sample
            elif self.skip_unreadable:
                self.unreadable[str(index)] = self.dataset.unreadable[index] = sample
            else:
                raise InputError(f"unreadable image: {sample}: replace or remove it, or set skip_unreadable=True")
        return pixels

    def _add_shard(self, parts: Sequence[dict[str, Tensor]]) -> None:
        path = _next_shard(self.directory, self.shards)
        tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        self._note()
        _write_shard(path, tensors)
        self.where.update((index, (len(self.shards), row)) for row, index in enumerate(tensors["indices"].tolist()))
        self.shards.append(path)

    def _note(self) -> None:
        """What decoding has found; before a shard, behind whose batches another run goes on."""
        self.enlarged.update(self.dataset.enlarged.copy())  # threads that decode the next batch add to it
        if self._noted != (counts := (len(self.unreadable), len(self.enlarged))):
            self.manifest["enlarged"], self._noted = sorted(self.enlarged), counts
            _write_manifest(self.directory, self.manifest)


def _decoded(dataset: ImageData, batches: Sequence[list[int]]) -> Iterator[list[Tensor | str]]:
    """Pixels [C, H, W] of each sample of each batch, or why there are none; threads decode the next batch while the
    VAE is at work."""
    with ThreadPoolExecutor(decoding_threads()) as pool:
        ahead: deque[list[Future]] = deque()
        for batch in [*batches, None]:
            if batch is not None:
                ahead.append([pool.submit(dataset.decode, index) for index in batch])
            if len(ahead) > 1 or (batch is None and ahead):
                yield [future.result() for future in ahead.popleft()]


@torch.no_grad()
def encode_batch(
    vae: nn.Module, pixels: Tensor, indices: Sequence[int], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The rows of a shard: ``latent_mean`` and ``latent_std`` [N, c, h, w] of pixels [N, C, H, W], and ``indices``."""
    first = next(vae.parameters())
    with evaluating(vae), torch.autocast(first.device.type, enabled=False):
        posterior = vae.encode(pixels.to(first.device, first.dtype)).latent_dist
    mean, std = (part.to("cpu", torch.float32).to(dtype).contiguous() for part in (posterior.mean, posterior.std))
    finite = (mean.isfinite() & std.isfinite()).flatten(1).all(1)
    if not bool(finite.all()):
        index = indices[int((~finite).nonzero()[0])]
        raise InputError(
            f"the VAE returns inf or NaN for sample {index} of the data: load it in float32, and save float32"
        )
    return {"latent_mean": mean, "latent_std": std, "indices": torch.tensor(indices, dtype=torch.int64, device="cpu")}


_WHAT = {
    "vae_hash": "another VAE",
    "data_hash": "other data",
    "preprocessing": "another preprocessing",
    "dtype": "another dtype",
    "scaling_factor": "another scaling factor of the VAE",
}


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    path = directory / _MANIFEST
    if not path.exists():
        if any(directory.glob("latents-*.safetensors")):
            raise InputError(f"{directory} has latents without a {_MANIFEST}: choose another directory")
        return None
    try:
        manifest = read_json(path, _LARGEST_MANIFEST)
        lists = (manifest.get("indices"), manifest.get("enlarged", []))
        known = manifest.get("format") == _FORMAT and all(isinstance(part, list) for part in lists)
        known = known and isinstance(manifest.get("unreadable", {}), dict)
    except (OSError, ValueError, AttributeError):
        known = False
    if not known:
        raise InputError(f"{path} is no manifest of latents of this version: choose another directory")
    return manifest


def _check_manifest(directory: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for key, what in _WHAT.items():
        if old.get(key) != new[key]:
            was, now = (_short(manifest.get(key)) for manifest in (old, new))
            raise InputError(
                f"{directory} holds latents of {what} ({was}, now {now}): choose another directory or remove it"
            )


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 40 and text.isalnum() else text


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    with atomic_path(directory / _MANIFEST) as partial:
        partial.write_text(json.dumps(manifest))


def _bytes(part: dict[str, Tensor]) -> int:
    return sum(value.nbytes for value in part.values())


def _row(parts: Sequence[dict[str, Tensor]]) -> int:
    """Bytes of one sample."""
    return _bytes(parts[0]) // len(parts[0]["indices"])


def _next_shard(directory: Path, shards: Sequence[Path]) -> Path:
    number = int(shards[-1].stem.removeprefix("latents-")) + 1 if shards else 0
    return directory / f"latents-{number:05}.safetensors"


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    with atomic_path(path) as partial:
        save_file(tensors, partial, metadata={"format": _FORMAT})


def _read_shards(directory: Path) -> tuple[list[Path], dict[int, tuple[int, int]]]:
    """Shards in order, and where each sample is."""
    from safetensors import SafetensorError, safe_open

    shards = [directory / name for name in sorted(fnmatch.filter(names_in(directory), "latents-[0-9]*.safetensors"))]
    where: dict[int, tuple[int, int]] = {}
    for number, path in enumerate(shards):
        try:
            with explain_open_errors(path), safe_open(path, framework="pt") as file:
                indices = file.get_tensor("indices").tolist()
                sizes = {file.get_slice(key).get_shape()[0] for key in ("latent_mean", "latent_std")}
        except (OSError, LookupError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{path} is damaged ({first_line(error)}): remove it, and it is made anew") from None
        if sizes != {len(indices)}:
            raise InputError(f"{path} is damaged: remove it, and it is made anew")
        for row, index in enumerate(indices):
            where[index] = number, row
    return shards, where


def latents_size(shape: Sequence[int], count: int, dtype: str = "float32") -> int:
    """Bytes that ``count`` latents of this shape [C, h, w] take on disk, for a plan."""
    return 2 * count * math.prod(shape) * _DTYPES[dtype].itemsize
