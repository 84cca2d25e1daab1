"""Checkpoints of a run: weights, optimizer, mask, generators and data position, written whole or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._files import atomic_directory
from ._names import own_names, unwrapped
from .errors import InputError
from .optim import UnlearnOptimizer
from .saliency import SaliencyMask

__all__ = ["find", "model_tensors", "read", "read_mask", "restore", "save"]

_FORMAT = "unlearn_ext.checkpoint.1"


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
    state: dict[str, Any],
) -> Path:
    """Writes ``directory/checkpoint-<iteration>``; ``state`` is JSON."""
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
        document = {
            "format": _FORMAT,
            "iteration": iteration,
            "param_groups": optimizer_state["param_groups"],
            "optimizer_numbers": numbers,
            **state,
        }
        (partial / "state.json").write_text(json.dumps(document))
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
    numbered = [
        (int(match[1]), path)
        for path in output_dir.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / "state.json").is_file()
    ]
    if not numbered:
        raise InputError(f"there is no checkpoint in {output_dir} to resume from")
    return max(numbered)[1]


def read(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    try:
        document = json.loads((path / "state.json").read_text())
    except json.JSONDecodeError:
        raise InputError(f"{path} is damaged: its state.json cannot be read; resume from an earlier one") from None
    for name, needed in (("model", True), ("optimizer", True), ("mask", document.get("masked", False))):
        if needed and not (path / f"{name}.safetensors").is_file():
            raise InputError(f"{path} is damaged: {name}.safetensors is missing; resume from an earlier one")
    if document.get("format") != _FORMAT:
        raise InputError(f"{path} is not a checkpoint of this version: start the run again")
    return document


def read_mask(path: Path) -> SaliencyMask | None:
    file = path / "mask.safetensors"
    return SaliencyMask.load(file) if file.is_file() else None


@torch.no_grad()
def restore(path: Path, document: dict[str, Any], model: nn.Module, optimizer: UnlearnOptimizer) -> None:
    """Puts weights, buffers and optimizer state back, after checking that they fit."""
    from safetensors.torch import load_file

    saved, own = load_file(path / "model.safetensors"), model_tensors(model)
    for name in saved.keys() | own.keys():
        if name not in saved or name not in own or saved[name].shape != own[name].shape:
            raise InputError(f"{path} holds another model: {name} is missing or has another shape")
    for name, value in own.items():
        value.copy_(saved[name])
    state: dict[int, dict[str, Any]] = {}
    entries = {**load_file(path / "optimizer.safetensors"), **document["optimizer_numbers"]}
    for key, value in entries.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    groups = [{**group, "betas": tuple(group["betas"])} for group in document["param_groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
