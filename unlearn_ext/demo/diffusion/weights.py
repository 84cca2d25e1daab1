"""Trained networks as float16 safetensors: shipped with the package, or trained once and kept in the cache directory.

A file's header says how the weights came about (``metadata``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...native.building import cache_directory
from ...native.library_cache import make_private
from ...utils.files import atomic_path
from ...utils.pixels import to_bytes
from .networks import DENOISERS, Denoiser, Judge, build_denoiser
from .pretraining import Trained, pretrain, pretrain_judge, recipe_for

__all__ = ["SHIPPED", "load", "load_file", "load_samples", "save", "save_samples"]

SHIPPED = Path(__file__).resolve().parents[1] / "weights"
NETWORKS = (*DENOISERS, "judge")


def load(
    name: str,
    *,
    seed: int = 0,
    without: int | None = None,
    anew: bool = False,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Trained:
    """A trained network: from the package, else from the cache, else trained now and put into the cache.

    Args:
        name: ``"ddpm"``, ``"dit"``, ``"text"``, or ``"judge"``.
        seed: of the training; only that of seed 0 ships.
        without: a digit that the network never saw; none such ships.
        anew: train it now whatever is there; what the package ships is not touched.
        progress: called with the stage, the steps done and the steps in all, if it is trained.
    """
    if name not in NETWORKS:
        raise InputError(f"expected one of {', '.join(NETWORKS)}, got {name!r}")
    if name == "judge" and without is not None:
        raise InputError("the judge knows all digits: it is not trained without one")
    cached = _cached(name, seed, without)
    if not anew:
        for path in (SHIPPED / f"{name}.safetensors" if seed == 0 and without is None else None, cached):
            if path is not None and path.is_file():
                return load_file(path)

    def report(done: int, total: int) -> None:
        if progress is not None:
            what = "" if without is None else f" without the digit {without}"
            progress(f"training the {name} network{what}", done, total)

    if name == "judge":
        trained = pretrain_judge(seed=seed, progress=report)
    else:
        trained = pretrain(name, seed=seed, without=without, progress=report)
    if cached is not None:
        try:
            make_private(cached.parent)
            save(trained, cached)
        except OSError:  # a cache that cannot be written costs the time of another training, nothing else
            pass
    return _rounded(trained)


def save(trained: Trained, path: str | Path) -> None:
    """Write the weights, rounded to float16, and the metadata. Equal copies of a DiT's embedders are written once."""
    from safetensors.torch import save_file

    tensors = {}
    for part, module in _parts(trained.network).items():
        state = module.state_dict()
        for key, value in state.items():
            first = _first_copy(key)
            if first == key or not torch.equal(value, state[first]):
                tensors[f"{part}.{key}"] = _half(value).contiguous()
    with atomic_path(path) as partial:
        save_file(tensors, partial, {"metadata": json.dumps({"name": trained.name, **trained.metadata})})


def load_file(path: str | Path) -> Trained:
    """Read what :func:`save` wrote into a network of float32 weights, in eval mode.

    Raises:
        InputError: when it is no such file, or not of a network of this version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("metadata", "{}"))
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error})") from None
    name = metadata.pop("name", None)
    if name not in NETWORKS:
        raise InputError(f"{path}: holds none of the demos' networks ({', '.join(NETWORKS)})")
    network = Judge() if name == "judge" else build_denoiser(name)
    for part, module in _parts(network).items():
        state = {
            key: tensors.get(f"{part}.{key}", tensors.get(f"{part}.{_first_copy(key)}")) for key in module.state_dict()
        }
        try:
            module.load_state_dict({key: value for key, value in state.items() if value is not None})
        except RuntimeError:
            raise InputError(f"{path}: its weights are of another version of the network {name}; delete it") from None
    return Trained(name, network.eval(), metadata)


def save_samples(path: str | Path, images: Tensor, labels: Tensor, metadata: dict[str, Any]) -> None:
    """Write pictures ``[N, 1, 16, 16]`` in [−1, 1] as bytes, with the labels they were asked for."""
    from safetensors.torch import save_file

    tensors = {"images": to_bytes(images).contiguous(), "labels": labels.to(torch.uint8)}
    with atomic_path(path) as partial:
        save_file(tensors, partial, {"metadata": json.dumps(metadata)})


def load_samples(name: str, without: int) -> tuple[Tensor, Tensor, dict[str, Any]] | None:
    """Shipped pictures of a network that was trained without one digit: images in [−1, 1], labels, metadata; ``None``
    where there are none, as for all digits but one."""
    from safetensors import safe_open

    path = SHIPPED / f"{name}-without-{without}.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        images, labels = file.get_tensor("images"), file.get_tensor("labels")
        metadata = json.loads(file.metadata()["metadata"])
    return images.float().div_(127.5).sub_(1), labels.long(), metadata


def _cached(name: str, seed: int, without: int | None = None) -> Path | None:
    """Where a training by the present recipe belongs; ``None`` without a cache directory."""
    from hashlib import sha256

    cache = cache_directory()
    if cache is None:
        return None
    recipe = "" if name == "judge" else json.dumps(asdict(recipe_for(name)), sort_keys=True)
    left_out = "" if without is None else f"-without-{without}"
    return cache / "demo" / f"{name}{left_out}-seed{seed}-{sha256(recipe.encode()).hexdigest()[:8]}.safetensors"


def _parts(network: Denoiser | Judge) -> dict[str, nn.Module]:
    return network.modules if isinstance(network, Denoiser) else {"judge": network}


def _first_copy(key: str) -> str:
    """The name of the same weight in a DiT's first block, if it is one of an embedder's; the name itself otherwise."""
    head, dot, tail = key.partition(".norm1.emb.")
    return "transformer_blocks.0" + dot + tail if dot and head.startswith("transformer_blocks.") else key


def _half(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value


@torch.no_grad()
def _rounded(trained: Trained) -> Trained:
    """With the weights that a file would hold, so that the first run and the later ones start alike."""
    for module in _parts(trained.network).values():
        for value in module.state_dict().values():
            value.copy_(_half(value))
    return trained
