"""Which prompts the images of a data set belong to, and what a forgotten one shall show instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import default_collate

from ..data.images import ImageData
from ..errors import InputError

__all__ = ["Concepts", "read_prompts"]


@dataclass(frozen=True)
class Concepts:
    """Prompts by class of the data.

    Attributes:
        prompts: one for each class.
        forget: the classes whose prompt is the forgotten one.
        replacement: the prompt that shall be shown in its place.
    """

    prompts: list[str]
    forget: list[int]
    replacement: str

    def collate(self, forget: bool) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Batches with prompts in place of labels; those of the forget set name their replacement."""

        def function(samples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = default_collate(samples)
            batch["prompts"] = [self.prompts[label] for label in batch.pop("labels").tolist()]
            if forget:
                batch["replace_prompts"] = [self.replacement] * len(samples)
            return batch

        return function


def read_prompts(data: ImageData, class_map: Path | None, forget_prompt: str, replace_prompt: str) -> Concepts:
    """The prompt of a folder is what ``class_map`` (JSON, folder -> prompt) says, or else its name.

    Raises:
        InputError: no images belong to the forgotten prompt, or to any other.
    """
    if not data.folders:
        raise InputError("prompts belong to folders: give the data as one folder for each prompt")
    given: dict[str, str] = {}
    if class_map is not None:
        try:
            given = json.loads(class_map.read_text())
        except (OSError, ValueError):
            given = []
        if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
            raise InputError(f'--class-map: {class_map} is no JSON of folders and prompts, as in {{"cats": "a cat"}}')
        for name in given:
            if name not in data.folders:
                raise InputError(f"--class-map: there is no folder {name!r} in the data")
    prompts = [""] * (max(data.folders.values()) + 1)
    for name, index in data.folders.items():
        prompts[index] = given.get(name, name)
    forget = [index for index, prompt in enumerate(prompts) if prompt == forget_prompt]
    if not forget:
        raise InputError(
            f"--forget-prompt: no folder belongs to {forget_prompt!r} (there are {', '.join(map(repr, prompts[:5]))}): "
            "name a folder so, or give a --class-map of folders and prompts"
        )
    if len(forget) == len(prompts):
        raise InputError("every image belongs to the forgotten prompt: add folders of what shall be retained")
    return Concepts(prompts, forget, replace_prompt)
