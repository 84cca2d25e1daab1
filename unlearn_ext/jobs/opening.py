"""The model and the data of a run, opened and checked against each other, and which classes are forgotten."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import default_collate

from ..data.images import ImageData, count_classes, is_sorted, open_data
from ..errors import InputError
from ..methods import DOMAINS
from ..models.pretrained import Pretrained, open_pretrained
from ..utils.arguments import check_choice
from .options import ForgetOptions, each_of
from .output import check_claim, is_waiting
from .prompts import Concepts, read_prompts
from .work import WorkFolder

__all__ = ["Opened", "claimable_work", "open_sources"]

_PRESETS = {"UNet2DModel": "ddpm-cifar10", "DiTTransformer2DModel": "dit-xl-2-256", "UNet2DConditionModel": "sd-nudity"}


@dataclass(frozen=True, eq=False, kw_only=True)
class Opened:
    """What a run works on.

    Attributes:
        pretrained: the opened folder.
        preset: the one that the options name, or that of the model's kind.
        data: the opened data; ``data.mapping`` says which folder is which class, and how many images it has.
        concepts: the prompts, of a model that takes prompts.
        forget_classes: indices into the data's classes.
    """

    options: ForgetOptions
    pretrained: Pretrained
    preset: str
    data: ImageData
    concepts: Concepts | None
    forget_classes: list[int]

    @property
    def model(self) -> nn.Module:
        return self.pretrained.denoiser

    @property
    def domain(self) -> dict[str, dict[str, Any]]:
        """What the preset needs beside the method's settings."""
        return DOMAINS[self.preset]

    @property
    def batch_size(self) -> int:
        return self.options.train_batch_size or self.domain["run"]["train_batch_size"]

    @property
    def encodes(self) -> bool:
        """Whether images become latents before they are used."""
        return self.pretrained.vae is not None and self.data.kind == "pixel_values"

    @property
    def in_bfloat16(self) -> bool:
        """Whether the trained weights are bfloat16 in the run."""
        return self.options.weights_dtype == "bfloat16"

    @property
    def names(self) -> dict[int, str]:
        """Class -> label text, or its number; the first class of each prompt -> the prompt."""
        if self.concepts is not None:
            return self.concepts.distinct
        return {i: self.pretrained.id2label.get(i, str(i)) for i in range(self.pretrained.classes.count)}

    @property
    def retained_count(self) -> int:
        """Retained classes that have data; of prompts, each once."""
        return sum(index in self.data.counts and index not in self.forget_classes for index in self.names)

    @property
    def forget_set(self) -> dict[str, str]:
        """What tells this forget set from others, for a mask's metadata."""
        identity = {
            "forget_classes": ",".join(map(str, sorted(self.forget_classes))),
            "forget_data": self.data.sha256,
        }
        if self.concepts is not None:
            prompts = [*(self.concepts.prompts[i] for i in self.forget_classes), self.concepts.replacement]
            identity["forget_prompts"] = json.dumps(prompts)
        return identity

    def collate(self, forget: bool) -> Callable[..., Any]:
        """The function that makes a batch of the forget or of the retain set."""
        return default_collate if self.concepts is None else self.concepts.collate(forget)


def claimable_work(options: ForgetOptions) -> WorkFolder:
    """The work folder of a run, which may use it and the output folder. Nothing is written.

    Raises:
        InputError: one of them lies in the data, or holds what the run may not touch.
    """
    resume, source = options.resume_from_checkpoint is not None, options.pretrained_model_name_or_path
    work = WorkFolder(options.output_dir, options.work_dir)
    for option, folder in (("--output-dir", options.output_dir), ("--work-dir", work.path)):
        if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(options.data)):
            raise InputError(
                f"{option}: {folder} lies in --data, where the next run would take it for a class: choose a folder "
                "outside it"
            )
    check_claim(options.output_dir, source, resume=resume, options=options.settings())
    if not is_waiting(options.output_dir):
        work.check(source, resume=resume)
    return work


def open_sources(options: ForgetOptions) -> Opened:
    """The model and the data that the options name.

    Raises:
        InputError: they cannot be opened or do not fit each other, or what is to be forgotten is not in them.
    """
    pretrained = open_pretrained(
        options.pretrained_model_name_or_path, device=options.device, null_class=options.null_class
    )
    _check_kind(options, pretrained)
    _check_null_class(options, pretrained)
    preset = options.preset or _PRESETS[type(pretrained.denoiser).__name__]
    check_choice("--preset", preset, DOMAINS)
    data = _open_data(options, pretrained)
    concepts = None
    if pretrained.kind == "text":
        concepts = read_prompts(data, options.class_map, each_of(options.forget_prompt), options.replace_prompt)
        forget_classes = concepts.forget
    else:
        chosen = (index for text in each_of(options.forget_class) for index in data.parse_classes(text))
        forget_classes = list(dict.fromkeys(chosen))
    return Opened(
        options=options,
        pretrained=pretrained,
        preset=preset,
        data=data,
        concepts=concepts,
        forget_classes=forget_classes,
    )


def _check_kind(options: ForgetOptions, pretrained: Pretrained) -> None:
    name, kind = type(pretrained.denoiser).__name__, pretrained.kind
    if name not in _PRESETS:
        raise InputError(f"the denoiser is a {name}, and {', '.join(_PRESETS)} are supported")
    if kind == "text" and options.forget_prompt is None:
        raise InputError("the model is told prompts: give --forget-prompt and --replace-prompt, not --forget-class")
    if kind == "class" and options.forget_class is None:
        raise InputError("the model is told classes: give --forget-class, not --forget-prompt")


def _check_null_class(options: ForgetOptions, pretrained: Pretrained) -> None:
    """No file of a UNet2DModel says whether it has one: the user does, or the data hold just the other classes."""
    name = type(pretrained.denoiser).__name__
    if name != "UNet2DModel":
        if options.null_class is not None:
            raise InputError(
                f"--null-class and --no-null-class are for a UNet2DModel, and the model is a {name}: leave them out"
            )
        return
    embeddings = pretrained.denoiser.config.num_class_embeds
    if options.null_class is None and not _maps_classes(options) and count_classes(options.data) == embeddings:
        raise InputError(
            f"{options.data} has {embeddings} class folders, as many as the model has class embeddings: say "
            "--no-null-class if each of them is a class of its own, or move away the folder that is none"
        )


def _maps_classes(options: ForgetOptions) -> bool:
    """Whether the data say which class is which, so that some may be missing."""
    return (options.class_map is not None and not is_sorted(options.class_map)) or not options.data.is_dir()


def _open_data(options: ForgetOptions, pretrained: Pretrained) -> ImageData:
    settings = pretrained.data_settings()
    if pretrained.kind == "text":
        return open_data(options.data, **settings)
    settings["class_map"] = options.class_map
    known = pretrained.classes.count
    undecided = type(pretrained.denoiser).__name__ == "UNet2DModel" and options.null_class is None
    undecided = undecided and _maps_classes(options)
    if undecided:
        settings["classes"] = known + 1
    data = open_data(options.data, **settings)
    if undecided and set(data.counts) != set(range(known)):
        raise InputError(
            f"the model has {known + 1} class embeddings and the data hold {len(data.counts)} classes, up to "
            f"{max(data.counts)}: say with --null-class that the last embedding stands for no class, or with "
            "--no-null-class that it is a class"
        )
    data.classes = known
    return data
