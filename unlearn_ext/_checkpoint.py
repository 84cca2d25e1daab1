"""Checkpoints of a run: weights, optimizer, mask, generators and data position, written whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._files import atomic_directory
from ._names import own_names, unwrapped
from .errors import InputError
from .optim import UnlearnOptimizer
from .saliency import SaliencyMask

__all__ = ["Checkpoint", "check", "find", "keep_newest", "model_tensors", "read", "restore", "save"]

_FORMAT = "unlearn_ext.checkpoint.4"
_DOCUMENT = ("iteration", "param_groups", "optimizer_numbers", "optimizer_settings", "settings", "masked", "seconds")
_DOCUMENT += ("counts", "timings", "protected", "stopped_at", "scalers", "forgetting", "batches")
_DOCUMENT += ("forget", "retain", "rng", "averaged")


@dataclass
class Checkpoint:
    """All that a checkpoint holds; ``optimizer`` as :meth:`UnlearnOptimizer.load_state_dict` takes it, ``averages`` the
    moving averages of the trained weights, by name, where the run keeps them."""

    path: Path
    document: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    mask: SaliencyMask | None
    averages: dict[str, Tensor]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by plain name; tied ones once."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in own_names(unwrapped(model).state_dict(keep_vars=True).items()).items():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            tensors[name] = value.detach()
    return tensors


def save(
    directory: Path,
    iteration: int,
    model: nn.Module,
    optimizer: UnlearnOptimizer,
    mask: SaliencyMask | None,
    averages: dict[str, Tensor],
    state: dict[str, Any],
) -> Path:
    """Writes ``directory/checkpoint-<iteration>``; ``averages`` may be empty, ``state`` is JSON."""
    from safetensors.torch import save_file

    path = directory / f"checkpoint-{iteration}"
    optimizer_state = optimizer.state_dict()
    tensors, numbers = {}, {}
    for index, entries in optimizer_state["state"].items():
        for key, value in entries.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{index}.{key}"] = value
    with atomic_directory(path) as partial:
        save_file(
            {n: t.clone(memory_format=torch.contiguous_format) for n, t in model_tensors(model).items()},
            partial / "model.safetensors",
        )
        save_file({n: t.contiguous() for n, t in tensors.items()}, partial / "optimizer.safetensors")
        if mask is not None:
            mask.save(partial / "mask.safetensors")
        if averages:
            save_file({n: t.contiguous() for n, t in averages.items()}, partial / "ema.safetensors")
        document = {
            "format": _FORMAT,
            "iteration": iteration,
            "param_groups": optimizer_state["param_groups"],
            "optimizer_numbers": numbers,
            "optimizer_settings": optimizer_state["settings"],
            "averaged": bool(averages),
            **state,
        }
        (partial / "state.json").write_text(json.dumps(document))
    for left in directory.glob(".checkpoint-*"):  # by processes that were killed in this very place
        shutil.rmtree(left, ignore_errors=True)
    return path


def find(output_dir: Path | None, wanted: str | Path) -> Path:
    """The checkpoint directory that ``latest`` or a path names."""
    if str(wanted) != "latest":
        path = Path(wanted)
        if not (path / "state.json").is_file():
            raise InputError(f"there is no checkpoint at {path}")
        return path
    if output_dir is None:
        raise InputError("resume_from_checkpoint='latest' needs the output_dir that holds the checkpoints")
    found = _by_iteration(output_dir)
    if not found:
        raise InputError(f"there is no checkpoint in {output_dir} to resume from")
    return found[-1]


def keep_newest(output_dir: Path, count: int) -> None:
    """Removes all checkpoints but the last ``count``."""
    for path in _by_iteration(output_dir)[:-count]:
        shutil.rmtree(path, ignore_errors=True)


def _by_iteration(output_dir: Path) -> list[Path]:
    numbered = [
        (int(match[1]), path)
        for path in output_dir.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / "state.json").is_file()
    ]
    return [path for _, path in sorted(numbered)]


def read(path: Path) -> Checkpoint:
    """Reads the whole of a checkpoint, so that what is damaged shows before anything is changed."""
    try:
        document = json.loads((path / "state.json").read_text())
        version = document.get("format")
    except (OSError, ValueError, AttributeError):
        raise _damaged(path, "its state.json cannot be read") from None
    if version != _FORMAT:
        raise InputError(f"{path} is not a checkpoint of this version: start the run again")
    for key in _DOCUMENT:
        if key not in document:
            raise _damaged(path, f"its state.json lacks {key}")
    model, tensors = _tensors(path / "model.safetensors"), _tensors(path / "optimizer.safetensors")
    mask = None
    if document["masked"]:
        try:
            mask = SaliencyMask.load(path / "mask.safetensors")
        except InputError as error:
            raise _damaged(path, str(error)) from None
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **document["optimizer_numbers"]}.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    groups = [{**group, "betas": tuple(group["betas"])} for group in document["param_groups"]]
    optimizer = {"state": state, "param_groups": groups, "settings": document["optimizer_settings"]}
    averages = _tensors(path / "ema.safetensors") if document["averaged"] else {}
    return Checkpoint(path, document, model, optimizer, mask, averages)


def _tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise _damaged(file.parent, f"{file.name} is missing")
    try:
        return load_file(file)
    except (OSError, SafetensorError):
        raise _damaged(file.parent, f"its {file.name} cannot be read") from None


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path} is damaged: {what}; resume from an earlier one")


def check(
    checkpoint: Checkpoint,
    model: nn.Module,
    names: Collection[str],
    settings: dict[str, Any],
    mask: SaliencyMask | None,
) -> None:
    """Whether the run at hand is the one that wrote the checkpoint.

    Args:
        names: of the trainable parameters, in any order.
        mask: what the method was given, if anything.
    """
    path, document = checkpoint.path, checkpoint.document
    saved, own = document["settings"], json.loads(json.dumps(settings))
    for key in {**saved, **own}:
        if not _same(saved.get(key), own.get(key)):
            raise InputError(
                f"{path} was written with {key}={saved.get(key)!r} and the method has {own.get(key)!r}: resume with "
                "the same settings"
            )
    if mask is not None and mask != checkpoint.mask:
        raise InputError(f"{path} was written with another mask: resume with the same one")
    tensors = model_tensors(model)
    for name in {**checkpoint.model, **tensors}:
        if name not in checkpoint.model or name not in tensors or not _alike(checkpoint.model[name], tensors[name]):
            raise InputError(f"{path} holds another model: {name} is missing or has another shape or dtype")
    for name in () if not document["averaged"] else names:
        if name not in checkpoint.averages or checkpoint.averages[name].shape != tensors[name].shape:
            raise _damaged(path, f"its ema.safetensors lacks {name}")
    trained = {name for group in document["param_groups"] for name in group["param_names"]}
    for name in sorted(trained.symmetric_difference(names)):
        was = "was" if name in trained else "was not"
        raise InputError(f"{path} is of a run in which {name} {was} trained: set requires_grad as it was then")


def _same(a: Any, b: Any) -> bool:
    """The order of a dict counts: that of param_groups is the order of the optimizer's state."""
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    return a == b


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


@torch.no_grad()
def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: UnlearnOptimizer) -> None:
    """Puts optimizer state, weights and buffers back; :func:`check` has found that they fit."""
    optimizer.load_state_dict(checkpoint.optimizer)
    for name, value in model_tensors(model).items():
        value.copy_(checkpoint.model[name])
