"""Which prompts the images of a data set belong to, and what a forgotten one shall show instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, default_collate

from ..data.images import ImageData
from ..data.labels import composed, printable
from ..errors import InputError
from ..utils.json_files import parse_json, read_text

__all__ = ["Concepts", "WithReplacements", "read_prompts"]


@dataclass(frozen=True)
class Concepts:
    """Prompts by class of the data.

    Attributes:
        prompts: one for each class.
        forget: the classes whose prompt is a forgotten one.
        replacement: the prompt that shall be shown in its place.
        replace_classes: the classes whose prompt that is. Their images stand for forgotten ones where the replacement
            is predicted, as released; without any, the forgotten images themselves do.
    """

    prompts: dict[int, str]
    forget: list[int]
    replacement: str
    replace_classes: list[int]

    @property
    def distinct(self) -> dict[int, str]:
        """The first class of each prompt, and the prompt."""
        first = {prompt: index for index, prompt in reversed(self.prompts.items())}
        return {index: prompt for index, prompt in self.prompts.items() if first[prompt] == index}

    def of_prompt(self, index: int) -> list[int]:
        """All classes that share its prompt."""
        return [other for other, prompt in self.prompts.items() if prompt == self.prompts[index]]

    def collate(self, forget: bool) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Batches with prompts in place of labels; those of the forget set name their replacement."""

        def function(samples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = default_collate(samples)
            batch["prompts"] = [self.prompts[label] for label in batch.pop("labels").tolist()]
            if forget:
                batch["replace_prompts"] = [self.replacement] * len(samples)
            return batch

        return function


class WithReplacements(Dataset):
    """Forgotten samples, each with another one's tensors beside its own under ``replace_`` names; indexed by pairs."""

    def __init__(self, data: Dataset):
        self.data = data

    def __getitem__(self, pair: Sequence[int]) -> dict[str, Any]:
        sample, other = (self.data[index] for index in pair)
        return {**sample, **{f"replace_{name}": value for name, value in other.items() if name != "labels"}}


def read_prompts(
    data: ImageData, class_map: Path | None, forget_prompts: Sequence[str], replace_prompt: str
) -> Concepts:
    """The prompt of a folder is what ``class_map`` (JSON, folder -> prompt) says, or else its name; that of an array's
    label is what ``class_map`` says (label -> prompt).

    Raises:
        InputError: no images belong to the forgotten prompt, or to any other; a label has no prompt.
    """
    names = data.folders or {str(label): label for label in data.counts}
    what, example = ("folder", "cats") if data.folders else ("label", "0")
    mapped = {} if class_map is None else _read_map(class_map, names, what, example)
    if not data.folders:
        for name in names:
            if name not in mapped:
                raise InputError(
                    f"the data have the label {name} and no prompt for it: give a --class-map of labels and prompts, "
                    f'as in {{"{name}": "a cat"}}'
                )
    prompts = {
        index: composed(mapped.get(name, name)) for name, index in sorted(names.items(), key=lambda item: item[1])
    }
    forget_prompts, replace_prompt = [composed(prompt) for prompt in forget_prompts], composed(replace_prompt)
    for prompt in (*prompts.values(), *forget_prompts, replace_prompt):
        _check_text(prompt)
    forget = [index for index, prompt in prompts.items() if prompt in forget_prompts]
    replace_classes = [index for index, prompt in prompts.items() if prompt == replace_prompt]
    for forget_prompt in forget_prompts:
        if forget_prompt in prompts.values():
            continue
        there = ", ".join(map(repr, list(dict.fromkeys(prompts.values()))[:5]))
        name = "name a folder so, or " if data.folders else ""
        raise InputError(
            f"--forget-prompt: no {what} belongs to {forget_prompt!r} (there are {there}): {name}give a --class-map of "
            f"{what}s and prompts"
        )
    if len(forget) == len(names):
        raise InputError("every image belongs to the forgotten prompt: add images of what shall be retained")
    return Concepts(prompts, forget, replace_prompt, replace_classes)


def _read_map(path: Path, names: Mapping[str, int], what: str, example: str) -> dict[str, str]:
    """Folder or label, as the data have it -> prompt."""
    try:
        pairs = parse_json(read_text(path), object_pairs_hook=list)
    except (OSError, ValueError):
        pairs = None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) and isinstance(pair[1], str) for pair in pairs):
        raise InputError(f'--class-map: {path} is no JSON of {what}s and prompts, as in {{"{example}": "a cat"}}')
    known = {composed(name): name for name in names} | {name: name for name in names}
    prompts: dict[str, str] = {}
    for key, prompt in pairs:
        name = known.get(key, known.get(composed(key)))
        if name is None:
            raise InputError(f"--class-map: there is no {what} {key!r} in the data")
        if name in prompts:
            raise InputError(f"--class-map: {path} names the {what} {key!r} twice")
        prompts[name] = prompt
    return prompts


def _check_text(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{printable(prompt)!r} is no text that can be a prompt: rename the folder, or name it in a --class-map"
        ) from None
