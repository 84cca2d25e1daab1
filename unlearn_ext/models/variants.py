"""Which of the weight files in a model's folder are read: safetensors or pickles, whole or in shards, variant or plain.

All forms that ``save_pretrained(variant=..., max_shard_size=..., safe_serialization=...)`` writes in diffusers and
transformers, for a stem S, an ending E and a variant V:

======= ============== ==================================================
plain   ``S.E``        ``S.E.index.json`` of ``S-00001-of-00002.E``
variant ``S.V.E``      ``S.E.index.V.json`` of ``S.V-00001-of-00002.E``
======= ============== ==================================================

Older releases of diffusers wrote ``S.E.V.index.json`` of ``S-00001-of-00002.V.E``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..utils.reading import check_stored
from .reading import read_config

__all__ = ["DIFFUSERS", "TRANSFORMERS", "Weights", "find_weights", "note_pickles"]

DIFFUSERS = {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"}  # ending -> stem
TRANSFORMERS = {"safetensors": "model", "bin": "pytorch_model"}
_SHARD = re.compile(r"-\d{5}-of-\d{5}(\.|$)")


@dataclass(frozen=True)
class Weights:
    """What ``from_pretrained`` is to be called with.

    Attributes:
        variant: such as ``fp16``; None for plain files.
        safetensors: else they are pickles, which torch reads without running their code.
    """

    variant: str | None
    safetensors: bool


def find_weights(home: Path, what: str, stems: dict[str, str]) -> Weights:
    """The weights in a model's folder: safetensors before pickles, plain ones before variants.

    Args:
        what: the model is called in errors.

    Raises:
        InputError: there are none, more than one variant, shards are missing, or
            a pickle would take more memory than its file is long.
    """
    if not (home / "config.json").is_file():
        raise InputError(f"the {what} in {home} has no config.json: it is missing or damaged")
    files = {entry.name for entry in home.iterdir()}
    chosen = _choose(home, what, stems, files)
    if not chosen.safetensors:
        for name in sorted(files):
            if name.startswith(stems["bin"]) and name.endswith(".bin"):
                check_stored(home / name)
    return chosen


def _choose(home: Path, what: str, stems: dict[str, str], files: set[str]) -> Weights:
    missing: str | None = None
    several: list[str] = []
    for ending, stem in stems.items():
        whole: set[str] = set()
        for variant, index in sorted(_candidates(files, stem, ending), key=lambda candidate: candidate[0] or ""):
            lacking = None if index is None else _lacking(home / index, files)
            missing = missing or lacking
            if lacking is None and variant is None:
                return Weights(None, ending == "safetensors")
            if lacking is None:
                whole.add(variant)
        if len(whole) == 1:
            return Weights(whole.pop(), ending == "safetensors")
        several = several or sorted(whole)
    if several:
        raise InputError(f"{home} has weights in the variants {' and '.join(several)}: keep one, or a plain file")
    if missing is not None:
        raise InputError(f"the weights of the {what} in {home} lack {missing}: get the missing file")
    stem = stems["safetensors"]
    shard = next((name for name in sorted(files) if name.startswith(stem) and _SHARD.search(name)), None)
    if shard is not None:
        raise InputError(f"the {what} in {home} has {shard} and no {stem}.safetensors.index.json: get the missing file")
    raise InputError(f"the {what} in {home} has no weights: expected {stem}.safetensors")


def note_pickles(models: Mapping[str, Weights]) -> str | None:
    """A sentence on those of the models, by what they are called, that are read from pickles."""
    pickled = [what for what, weights in models.items() if not weights.safetensors]
    if not pickled:
        return None
    return (
        f"weights of the {' and the '.join(pickled)} are pickles (.bin), read by torch as tensors alone, without their "
        "code; from_pretrained and save_pretrained make safetensors of them"
    )


def _candidates(files: set[str], stem: str, ending: str) -> list[tuple[str | None, str | None]]:
    """Variant, and index of the shards, None where one file holds all."""
    forms = (
        rf"{stem}(?:\.(?P<variant>.+))?\.{ending}",
        rf"{stem}\.{ending}\.index(?:\.(?P<variant>.+))?\.json",
        rf"{stem}\.{ending}\.(?P<variant>.+)\.index\.json",
    )
    candidates: list[tuple[str | None, str | None]] = []
    for name in sorted(files):
        for number, form in enumerate(forms):
            match = re.fullmatch(form, name)
            if match is not None and not (number == 0 and _SHARD.search(name)):
                candidates.append((match["variant"], name if number else None))
    return candidates


def _lacking(index: Path, files: set[str]) -> str | None:
    """The first shard of an index that is not there."""
    shards = read_config(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise InputError(f"{index} has no weight_map of names and files: it is damaged")
    for name in sorted(set(shards.values())):
        if Path(name).name != name:
            raise InputError(f"{index} names the file {name[:100]!r}, which is not beside it: it is damaged")
        if name not in files:
            return name
    return None
