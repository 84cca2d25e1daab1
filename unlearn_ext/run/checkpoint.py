"""Checkpoints of a run: weights, optimizer, mask, generators, history and data position, written whole or not at all.

Every file's hash stands in the checkpoint's ``SHA256SUMS`` and is checked before anything is loaded; a checkpoint with
any other file is refused, since another could be read in place of those.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.ranks import ALONE, Ranks
from ..distributed.shards import is_sharded, local, part_like
from ..errors import DamagedError, InputError
from ..optim import UnlearnOptimizer
from ..saliency import SaliencyMask
from ..utils.documents import EACH, NUMBER, OPTIONAL, fits
from ..utils.files import atomic_directory, follow_umask, writing
from ..utils.seal import SEAL, damage, label_of, seal
from .checkpoint_folder import STATE, keep_newest, make_room
from .checkpoint_tensors import StoredTensors, described, open_tensors, write_tensors
from .history import HISTORY, as_lines, read_lines
from .module_state import all_tensors as model_tensors
from .module_state import forms, pack_module, plain_tensors, unpack_module
from .packing import Packer, put

__all__ = ["Checkpoint", "check", "keep_newest", "model_tensors", "read", "restore", "save", "verify"]

_FORMAT = "unlearn_ext.checkpoint.8"
_PACKED = {"tensors": dict, "forms": dict, "extra": dict, "buffers": dict}
_LOSSES = {"last": [NUMBER], "bounds": [NUMBER], "count": int}
_DOCUMENT = {
    "run": str,
    "iteration": int,
    "param_groups": [{"params": [int], "param_names": [str]}],
    "optimizer_numbers": {EACH: NUMBER},
    "optimizer_settings": dict,
    "settings": dict,
    "masked": bool,
    "seconds": NUMBER,
    "counts": {"forget_steps": int, "retain_steps": int},
    "timings": {EACH: NUMBER},
    "protected": (list, OPTIONAL),
    "stopped_at": (int, OPTIONAL),
    "scalers": {EACH: dict},
    "forgetting": dict,
    "method": dict,
    "batches": [dict],
    "streams": [dict],
    "rng": [dict],
    "parts": [str],
    "tensors": {EACH: [int]},
    "packed": {EACH: _PACKED},
    "watching": {
        "retain": _LOSSES,
        "forget": _LOSSES,
        "before": [NUMBER],
        "bits": (list, OPTIONAL),
        "pull": (*NUMBER, OPTIONAL),
    },
}


@dataclass
class Checkpoint:
    """All that a checkpoint holds."""

    path: Path
    document: dict[str, Any]
    tensors: StoredTensors
    mask: SaliencyMask | None
    history: list[dict[str, Any]]


def save(
    directory: Path,
    run: str,
    iteration: int,
    models: dict[str, nn.Module],
    optimizer: UnlearnOptimizer,
    mask: SaliencyMask | None,
    averages: dict[str, Tensor],
    history: list[dict[str, Any]],
    state: dict[str, Any],
    ranks: Ranks = ALONE,
    written: Collection[str] = (),
) -> Path:
    """Writes ``directory/checkpoint-<iteration>``. All ranks call it.

    Args:
        run: its id.
        models: ``model``, and ``teacher`` where there is one whose weights the run needs.
        averages: may be empty.
        state: what else it takes to go on; JSON.
        written: non-persistent buffers of the model that the run has written to.

    Raises:
        WriteError: the disk is full, the folder is gone.
    """
    path = directory / f"checkpoint-{iteration}"
    optimizer_state, packer = optimizer.state_dict(), Packer()
    tensors, packed = {}, {}
    for part, model in models.items():
        tensors |= {f"{part}.{name}": value for name, value in plain_tensors(model).items()}
        packed[part] = pack_module(model, packer, written if part == "model" else ())
    tensors |= {f"ema.{name}": value for name, value in averages.items()}
    tensors |= {f"extra.{key}": value for key, value in packer.tensors.items()}
    numbers = {}
    for index, entries in optimizer_state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                numbers[f"{index}.{key}"] = value
    document = {
        "format": _FORMAT,
        "run": run,
        "iteration": iteration,
        "param_groups": optimizer_state["param_groups"],
        "optimizer_numbers": numbers,
        "optimizer_settings": optimizer_state["settings"],
        "parts": ["model", "optimizer", *(p for p in ("ema", "teacher", "extra") if _has(tensors, p))],
        "tensors": described(tensors),
        "packed": packed,
        **state,
    }
    with _shared_directory(path, run, ranks) as partial:
        write_tensors(partial, tensors, ranks)
        with ranks.together():
            if ranks.first:
                with writing(path):
                    if mask is not None:
                        mask.save(partial / "mask.safetensors")
                    (partial / HISTORY).write_text(as_lines(history), encoding="utf-8")
                    (partial / STATE).write_text(json.dumps(document), encoding="utf-8")
                    seal(partial, f"run {run}")
                    follow_umask(partial)
    return path


def _has(tensors: dict[str, Tensor], part: str) -> bool:
    return any(key.startswith(f"{part}.") for key in tensors)


@contextlib.contextmanager
def _shared_directory(path: Path, run: str, ranks: Ranks) -> Iterator[Path]:
    """One that all ranks write into. It has its name when all of them have left the block."""
    with contextlib.ExitStack() as stack:
        partial = None
        with ranks.together():
            if ranks.first:
                partial = stack.enter_context(atomic_directory(path))
        yield ranks.from_first(partial)
        with ranks.together():
            if ranks.first:
                with writing(path):
                    make_room(path, run)
            stack.close()


def verify(path: Path) -> None:
    """Whether every file is as it was written, and no other is there; reads all of them.

    Raises:
        DamagedError: one is not, or was added; the message names it.
        InputError: it is a checkpoint of another version of this package.
    """
    if not (path / SEAL).is_file():  # older versions had none
        version = None
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            version = json.loads((path / STATE).read_text(encoding="utf-8")).get("format")
        if version not in (None, _FORMAT):
            raise _other_version(path)
    if (what := damage(path, alone=True)) is not None:
        raise _damaged(path, what)


def read(path: Path, ranks: Ranks = ALONE) -> Checkpoint:
    """Opens a checkpoint that was verified and reads what all ranks need."""
    try:
        document = json.loads((path / STATE).read_text(encoding="utf-8"))
        version = document.get("format")
    except (OSError, ValueError, AttributeError, RecursionError):
        raise _damaged(path, "its state.json cannot be read") from None
    if version != _FORMAT:
        raise _other_version(path)
    for key, form in _DOCUMENT.items():
        if key not in document:
            raise _damaged(path, f"its state.json lacks {key}")
        if not fits(document[key], form):
            raise _damaged(path, f"{key} in its state.json is not what a run writes")
    if not len(document["batches"]) == len(document["streams"]) == len(document["rng"]) > 0:
        raise _damaged(path, "its state.json has not the same number of ranks throughout")
    if label_of(path) != f"run {document['run']}":
        raise _damaged(path, f"its {SEAL} names another run than its state.json")
    tensors = open_tensors(path, document["tensors"], document["parts"], lambda what: _damaged(path, what), ranks)
    mask = None
    if document["masked"]:
        try:
            mask = SaliencyMask.load(path / "mask.safetensors")
        except InputError as error:
            raise _damaged(path, str(error)) from None
    return Checkpoint(path, document, tensors, mask, read_lines(path / HISTORY))


def _damaged(path: Path, what: str) -> DamagedError:
    return DamagedError(f"{path} is damaged: {what}; resume from an earlier one")


def _other_version(path: Path) -> InputError:
    return InputError(f"{path} is not a checkpoint of this version: start the run again")


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
                f"{path} was written with {key}={saved.get(key)!r} and this run has {own.get(key)!r}: resume with "
                "the same settings"
            )
    if mask is not None and mask != checkpoint.mask:
        raise InputError(f"{path} was written with another mask: resume with the same one")
    tensors, saved_tensors = forms(model), _saved_forms(checkpoint, "model")
    for name in {**saved_tensors, **tensors}:
        if name not in saved_tensors or name not in tensors or saved_tensors[name] != tensors[name]:
            raise InputError(f"{path} holds another model: {name} is missing or has another shape or dtype")
    if pack_module(model, Packer())["extra"].keys() != document["packed"]["model"]["extra"].keys():
        raise InputError(f"{path} holds another model: other modules of it have get_extra_state")
    averages = checkpoint.tensors.part("ema")
    for name in names if "ema" in document["parts"] else ():
        if name not in averages or averages[name][0] != tensors[name][0]:
            raise _damaged(path, f"its moving averages lack {name}")
    teacher = _saved_forms(checkpoint, "teacher")
    for name in saved_tensors if "teacher" in document["packed"] else ():
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


def _saved_forms(checkpoint: Checkpoint, part: str) -> dict[str, Any]:
    """What :func:`forms` gave of the model that was saved."""
    odd = checkpoint.document["packed"].get(part, {"forms": {}})["forms"]
    return checkpoint.tensors.part(part) | {name: (tuple(size), kind) for name, (size, kind) in odd.items()}


@torch.no_grad()
def restore(
    checkpoint: Checkpoint,
    models: dict[str, nn.Module],
    optimizer: UnlearnOptimizer,
    averages: dict[str, Tensor] | None = None,
) -> None:
    """Puts optimizer state, moving averages, and the weights, buffers and extra state of ``models`` back;
    :func:`check` has found that they fit."""
    document, stored = checkpoint.document, checkpoint.tensors
    targets = {f"{part}.{name}": value for part, m in models.items() for name, value in plain_tensors(m).items()}
    targets |= {f"ema.{name}": value for name, value in (averages or {}).items()}
    indices = itertools.chain(*(group["params"] for group in document["param_groups"]))
    by_index = {str(index): p for index, (_, p) in zip(indices, optimizer.named_parameters(), strict=True)}
    of_optimizer = stored.part("optimizer")
    of_weights = {f"optimizer.{key}": by_index[key.partition(".")[0]].detach() for key in of_optimizer}
    extra = {
        f"extra.{key}": torch.empty(form[0], dtype=form[1], device="cpu") for key, form in stored.part("extra").items()
    }
    found = stored.load({**targets, **of_weights, **extra})
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**document["optimizer_numbers"], **{k: found[f"optimizer.{k}"] for k in of_optimizer}}.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    parts = {"param_groups": document["param_groups"], "settings": document["optimizer_settings"]}
    optimizer.load_state_dict({"state": state, **parts})
    for key, value in targets.items():
        saved = found[key]
        put(local(value), local(saved) if is_sharded(saved) else part_like(saved, value))
    for part, model in models.items():
        unpack_module(model, document["packed"][part], lambda key: found[f"extra.{key}"])
