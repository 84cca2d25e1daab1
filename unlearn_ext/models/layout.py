"""Names in a folder of diffusers: its index, the folders of a pipeline's parts, and which files are weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

__all__ = ["COMPONENTS", "INDEX", "PICKLES", "is_weights", "named_part", "part_names"]

INDEX = "model_index.json"
# Parts beside a denoiser, where no index names them.
COMPONENTS = ("vae", "text_encoder", "tokenizer", "scheduler", "feature_extractor", "safety_checker", "image_encoder")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHTS = (*PICKLES, ".safetensors", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".gguf")
_WEIGHTS_INDEX = re.compile(r"\.index(\..+)?\.json$")


def is_weights(path: PurePosixPath) -> bool:
    """Whether a file holds weights, in whatever format, or says in which files they are."""
    name = path.name.lower()
    return name.endswith(_WEIGHTS) or _WEIGHTS_INDEX.search(name) is not None


def part_names(index: Mapping[str, Any]) -> list[str]:
    """Folders of a pipeline's parts."""
    return [key for key in index if named_part(index, key)[1] is not None]


def named_part(index: Mapping[str, Any], key: str) -> tuple[str | None, str | None]:
    """Library and class of a part; None for both where there is none."""
    value = None if key.startswith("_") else index.get(key)  # _class_name may be a pair, of own code
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(part, str) for part in value):
        return None, None
    return value[0], value[1]
