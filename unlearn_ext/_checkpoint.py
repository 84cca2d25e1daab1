"""Checkpoints of a run: weights, optimizer, mask, generators and data position, written whole or not at all."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._checkpoint_tensors import Form, StoredTensors, described, open_tensors, write_tensors
from ._files import atomic_directory
from ._names import own_names, unwrapped
from ._ranks import ALONE, Ranks
from ._shards import is_sharded, local, part_like
from .errors import InputError
from .optim import UnlearnOptimizer
from .saliency import SaliencyMask

__all__ = ["Checkpoint", "check", "find", "keep_newest", "model_tensors", "read", "restore", "save"]

_FORMAT = "unlearn_ext.checkpoint.6"
_DOCUMENT = ("iteration", "param_groups", "optimizer_numbers", "optimizer_settings", "settings", "masked", "seconds")
_DOCUMENT += ("counts", "timings", "protected", "stopped_at", "scalers", "forgetting", "batches")
_DOCUMENT += ("method", "streams", "rng", "parts", "tensors")


@dataclass
class Checkpoint:
    """All that a checkpoint holds."""

    path: Path
    document: dict[str, Any]
    tensors: StoredTensors
    mask: SaliencyMask | None


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
    teacher: dict[str, Tensor],
    state: dict[str, Any],
    ranks: Ranks = ALONE,
) -> Path:
    """Writes ``directory/checkpoint-<iteration>``; ``averages`` and ``teacher`` may be empty, ``state`` is JSON. All
    ranks call it."""
    path = directory / f"checkpoint-{iteration}"
    optimizer_state = optimizer.state_dict()
    tensors = {f"model.{name}": value for name, value in model_tensors(model).items()}
    tensors |= {f"ema.{name}": value for name, value in averages.items()}
    tensors |= {f"teacher.{name}": value for name, value in teacher.items()}
    numbers = {}
    for index, entries in optimizer_state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                numbers[f"{index}.{key}"] = value
    document = {
        "format": _FORMAT,
        "iteration": iteration,
        "param_groups": optimizer_state["param_groups"],
        "optimizer_numbers": numbers,
        "optimizer_settings": optimizer_state["settings"],
        "parts": ["model", "optimizer"] + ["ema"] * bool(averages) + ["teacher"] * bool(teacher),
        "tensors": described(tensors),
        **state,
    }
    with _shared_directory(path, ranks) as partial:
        write_tensors(partial, tensors, ranks)
        with ranks.together():
            if ranks.first:
                if mask is not None:
                    mask.save(partial / "mask.safetensors")
                (partial / "state.json").write_text(json.dumps(document))
    if ranks.first:
        for left in directory.glob(".checkpoint-*"):  # by processes that were killed in this very place
            shutil.rmtree(left, ignore_errors=True)
    return path


@contextlib.contextmanager
def _shared_directory(path: Path, ranks: Ranks) -> Iterator[Path]:
    """One that all ranks write into. It has its name when all of them have left the block."""
    with contextlib.ExitStack() as stack:
        partial = None
        with ranks.together():
            if ranks.first:
                partial = stack.enter_context(atomic_directory(path))
        yield ranks.from_first(partial)
        with ranks.together():
            stack.close()


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


def read(path: Path, ranks: Ranks = ALONE) -> Checkpoint:
    """Opens a checkpoint and reads what all ranks need, so that what is damaged shows before anything is changed."""
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
    tensors = open_tensors(path, document["tensors"], document["parts"], lambda what: _damaged(path, what), ranks)
    mask = None
    if document["masked"]:
        try:
            mask = SaliencyMask.load(path / "mask.safetensors")
        except InputError as error:
            raise _damaged(path, str(error)) from None
    return Checkpoint(path, document, tensors, mask)


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path} is damaged: {what}; resume from an earlier one")


def check(
    checkpoint: Checkpoint,
    model: nn.Module,
    names: Collection[str],
    settings: dict[str, Any],
    defaults: dict[str, Any],
    mask: SaliencyMask | None,
) -> None:
    """Whether the run at hand is the one that wrote the checkpoint.

    Args:
        names: of the trainable parameters, in any order.
        defaults: of the settings: what one had that is younger than the checkpoint.
        mask: what the method was given, if anything.
    """
    path, document = checkpoint.path, checkpoint.document
    own, younger = json.loads(json.dumps(settings)), json.loads(json.dumps(defaults))
    saved = {**{key: value for key, value in younger.items() if key in own}, **document["settings"]}
    for key in {**saved, **own}:
        if not _same(saved.get(key), own.get(key)):
            raise InputError(
                f"{path} was written with {key}={saved.get(key)!r} and the method has {own.get(key)!r}: resume with "
                "the same settings"
            )
    if mask is not None and mask != checkpoint.mask:
        raise InputError(f"{path} was written with another mask: resume with the same one")
    tensors = model_tensors(model)
    saved_tensors, averages = checkpoint.tensors.part("model"), checkpoint.tensors.part("ema")
    for name in {**saved_tensors, **tensors}:
        if name not in saved_tensors or name not in tensors or saved_tensors[name] != _form(tensors[name]):
            raise InputError(f"{path} holds another model: {name} is missing or has another shape or dtype")
    for name in names if "ema" in document["parts"] else ():
        if name not in averages or averages[name][0] != tuple(tensors[name].shape):
            raise _damaged(path, f"its moving averages lack {name}")
    teacher = checkpoint.tensors.part("teacher")
    for name in saved_tensors if "teacher" in document["parts"] else ():
        if teacher.get(name) != saved_tensors[name]:
            raise _damaged(path, f"its teacher lacks {name}")
    trained = {name for group in document["param_groups"] for name in group["param_names"]}
    for name in sorted(trained.symmetric_difference(names)):
        was = "was" if name in trained else "was not"
        raise InputError(f"{path} is of a run in which {name} {was} trained: set requires_grad as it was then")


def _same(a: Any, b: Any) -> bool:
    """The order of a dict counts: that of param_groups is the order of the optimizer's state."""
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    return a == b


def _form(tensor: Tensor) -> Form:
    return tuple(tensor.shape), tensor.dtype


@torch.no_grad()
def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: UnlearnOptimizer,
    averages: dict[str, Tensor] | None = None,
    teacher: dict[str, Tensor] | None = None,
) -> None:
    """Puts optimizer state, weights, buffers, moving averages and a teacher's weights back; :func:`check` has found
    that they fit."""
    document, stored = checkpoint.document, checkpoint.tensors
    targets = {f"model.{name}": value for name, value in model_tensors(model).items()}
    targets |= {f"ema.{name}": value for name, value in (averages or {}).items()}
    targets |= {f"teacher.{name}": value for name, value in (teacher or {}).items()}
    indices = itertools.chain(*(group["params"] for group in document["param_groups"]))
    by_index = {str(index): p for index, (_, p) in zip(indices, optimizer.named_parameters(), strict=True)}
    of_optimizer = stored.part("optimizer")
    of_weights = {f"optimizer.{key}": by_index[key.partition(".")[0]].detach() for key in of_optimizer}
    found = stored.load({**targets, **of_weights})
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**document["optimizer_numbers"], **{k: found[f"optimizer.{k}"] for k in of_optimizer}}.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    parts = {"param_groups": document["param_groups"], "settings": document["optimizer_settings"]}
    optimizer.load_state_dict({"state": state, **parts})
    for key, value in targets.items():
        saved = found[key]
        local(value).copy_(local(saved) if is_sharded(saved) else part_like(saved, value))
