"""Adapters that lie beside a model or in its weights and are not merged: opened without them it is another model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import InputError

__all__ = ["check_adapter_files", "check_adapter_tensors"]

_FILE = re.compile(r"adapter_config\.json|adapter_model\.\w+|pytorch_lora_weights(\..+)?\.(safetensors|bin)")
_TENSOR = re.compile(r"(^|[._])(lora|loha|lokr|hada|oft|ia3|dora|vera)[._]|\.base_layer\.|\.modules_to_save\.")
_MERGE = (
    "merge it (load_lora_weights, fuse_lora and unload_lora_weights of the pipeline, then save_pretrained; of peft "
    "merge_and_unload)"
)


def check_adapter_files(*homes: Path) -> None:
    """Refuses folders in which an adapter lies.

    Raises:
        InputError: with its name.
    """
    for home in homes:
        files = sorted(entry.name for entry in home.iterdir()) if home.is_dir() else []
        adapter = next((name for name in files if _FILE.fullmatch(name)), None)
        if adapter is not None:
            raise InputError(
                f"{home} holds {adapter}, an adapter, without which the model would be opened: {_MERGE}, or move it "
                "away"
            )


def check_adapter_tensors(home: Path, what: str, names: Iterable[str]) -> None:
    """Refuses weights of which some belong to an adapter.

    Args:
        what: the model is called in errors.
        names: of tensors in the file that the model lacks, or the other way round.

    Raises:
        InputError: with the first of them.
    """
    adapter = next((name for name in sorted(map(str, names)) if _TENSOR.search(name)), None)
    if adapter is not None:
        raise InputError(
            f"the weights of the {what} in {home} hold an adapter that is not merged ({adapter}): {_MERGE}"
        )
