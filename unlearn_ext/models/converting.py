"""How a checkpoint that is one file becomes a folder in diffusers' layout."""

from __future__ import annotations

import zipfile
from pathlib import Path

__all__ = ["how_to_convert"]

_STABLE_DIFFUSION = b"model.diffusion_model."  # begins the names of tensors in its original checkpoints
_LOOKED_AT = 16 << 20  # bytes, of names; nothing is unpickled


def how_to_convert(path: Path) -> str:
    """Advice for this file: only for Stable Diffusion does diffusers convert one by itself."""
    if _STABLE_DIFFUSION in _names(path):
        return (
            "convert it, where you trust it, with diffusers' "
            "StableDiffusionPipeline.from_single_file(...).save_pretrained(...)"
        )
    return (
        "convert it, where you trust it, by the script for its kind in diffusers' repository (for DiT, "
        "scripts/convert_dit_to_diffusers.py)"
    )


def _names(path: Path) -> bytes:
    """The part of a checkpoint in which the names of its tensors stand."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if info.filename.endswith("data.pkl"):
                        with archive.open(info) as file:
                            return file.read(_LOOKED_AT)
        with open(path, "rb") as file:
            return file.read(_LOOKED_AT)
    except Exception:  # a damaged archive; it is refused anyhow
        return b""
