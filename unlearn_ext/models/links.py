"""Links in a model's folder: a result must not hold a copy of what lies elsewhere on the machine."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import InputError

__all__ = ["check_links", "leaves"]


def leaves(path: Path, root: Path) -> bool:
    """Whether a file or folder below ``root`` lies elsewhere, because it is a link or below one.

    The hub's cache is made of links from ``models--owner--name/snapshots/<commit>`` to ``models--owner--name/blobs``;
    those of the same model count as inside.
    """
    real, inside = (Path(os.path.realpath(each)) for each in (path, root))
    if real.is_relative_to(inside):
        return False
    model = real.parent.parent
    return not (real.parent.name == "blobs" and model.name.startswith("models--") and model in inside.parents)


def check_links(root: Path, parts: Iterable[str]) -> None:
    """Refuses a model of which a part is a link that leaves its folder.

    Args:
        parts: files and folders of the model, relative to ``root``; those that are not there are passed over.

    Raises:
        InputError: with the first of them.
    """
    for part in parts:
        for path in (root / part, *_below(root / part)):
            if leaves(path, root):
                raise InputError(
                    f"{path} is a link that leaves the model's folder, and results hold copies of its files: put the "
                    "file itself in place of the link"
                )


def _below(path: Path) -> list[Path]:
    return sorted(path.rglob("*")) if path.is_dir() else []
