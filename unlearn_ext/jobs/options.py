"""What ``unlearn-ext forget`` is asked for, checked before anything is opened."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.images import is_sorted
from ..data.labels import composed
from ..distributed.modes import PRECISIONS
from ..errors import InputError
from ..evaluation.inception import check_file
from ..saliency.storage import check_storage
from ..utils.arguments import check_choice, check_count, check_finite, check_number
from ..utils.files import user_path
from .parallel import PARALLEL

__all__ = ["WEIGHTS_DTYPES", "ForgetOptions", "each_of"]

_PATHS = ("pretrained_model_name_or_path", "data", "output_dir", "class_map", "mask", "work_dir", "classifier")
_PATHS += ("fid_weights",)
WEIGHTS_DTYPES = ("float32", "bfloat16")
_MOST_SAMPLES = 100_000  # of each class: beyond a million in all, two seeds may share noise


@dataclass(frozen=True, kw_only=True)
class ForgetOptions:
    """``unlearn-ext forget --help`` explains each; None leaves a choice to the preset of the model's kind."""

    pretrained_model_name_or_path: Path
    data: Path
    output_dir: Path
    forget_class: str | Sequence[str] | None = None
    class_map: Path | None = None
    null_class: bool | None = None
    forget_prompt: str | Sequence[str] | None = None
    replace_prompt: str | None = None
    preset: str | None = None
    max_train_steps: int | None = None
    train_batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
    forget_alpha: float | None = None
    gamma: float | None = None
    mask_fraction: float | None = None
    mask: Path | None = None
    fisher_batches: int | None = None
    trained_weights: str | None = None
    tie_embeddings: bool | None = None
    ema_decay: float | None = None
    save_weights: str = "last"
    mixed_precision: str = "no"
    weights_dtype: str = "float32"
    optimizer_in_backward: bool = False
    fisher_storage: str = "device"
    gradient_checkpointing: bool = False
    channels_last: bool = False
    checkpointing_steps: int | None = None
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str | None = None
    work_dir: Path | None = None
    keep_work: bool = False
    classifier: Path | None = None
    fid_weights: Path | None = None
    samples: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float | None = None
    strict: bool = False
    seed: int = 0
    device: str = "cpu"
    parallel: str = "ddp"

    def __post_init__(self) -> None:
        for name in _PATHS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, user_path(getattr(self, name)))
        for name in ("forget_class", "forget_prompt"):  # one is written to the result as a text, several as a list
            values = each_of(getattr(self, name))
            object.__setattr__(self, name, list(values) if len(values) > 1 else next(iter(values), None))
        self._check_what_is_forgotten()
        self._check_numbers()
        self._check_weights()
        self._check_precision()
        self._check_mask()
        self._check_judges()

    def _check_what_is_forgotten(self) -> None:
        if not self.data.exists():
            raise InputError(f"--data: there is nothing at {self.data}")
        if self.class_map is not None and not is_sorted(self.class_map) and not self.class_map.is_file():
            raise InputError(f"--class-map: there is no file {self.class_map}")
        if (self.forget_class is None) == (self.forget_prompt is None):
            raise InputError("say what to forget: either --forget-class, or --forget-prompt with --replace-prompt")
        if (self.forget_prompt is None) != (self.replace_prompt is None):
            raise InputError(
                "--forget-prompt and --replace-prompt go together: what to forget, and what to show instead"
            )
        if composed(self.replace_prompt or "") in map(composed, each_of(self.forget_prompt)):
            raise InputError("--replace-prompt: expected another prompt than the one to forget")

    def _check_numbers(self) -> None:
        optional = ("max_train_steps", "train_batch_size", "fisher_batches", "checkpointing_steps")
        for name in (*optional, "checkpoints_total_limit", "samples"):
            if getattr(self, name) is not None:
                check_count(_option(name), getattr(self, name))
        for name in ("gradient_accumulation_steps", "num_inference_steps"):
            check_count(_option(name), getattr(self, name))
        for name in ("learning_rate", "forget_alpha"):  # with 0 nothing would be forgotten
            if (value := getattr(self, name)) is not None:
                check_number(_option(name), value, "a finite number above 0", lambda x: 0.0 < x < math.inf)
        for name in ("gamma", "guidance_scale"):
            if getattr(self, name) is not None:
                check_finite(_option(name), getattr(self, name))
        if self.samples is not None and self.samples > _MOST_SAMPLES:
            raise InputError(f"--samples: expected at most {_MOST_SAMPLES:,} of each class, got {self.samples}")
        if self.ema_decay is not None:
            check_number("--ema-decay", self.ema_decay, "a number from 0, below 1", lambda x: 0.0 <= x < 1.0)
        if self.mask_fraction is not None:
            check_number("--mask-fraction", self.mask_fraction, "a fraction above 0, up to 1", lambda x: 0.0 < x <= 1.0)

    def _check_weights(self) -> None:
        if self.save_weights not in ("last", "ema"):
            raise InputError(f"--save-weights: expected last or ema, got {self.save_weights!r}")
        for name, needed in (  # each would do nothing
            ("ema_decay", None if self.save_weights == "ema" else "--save-weights ema"),
            ("samples", None if self.classifier or self.fid_weights else "--classifier or --fid-weights, which judge"),
            ("checkpoints_total_limit", "--checkpointing-steps" if self.checkpointing_steps is None else None),
        ):
            if getattr(self, name) is not None and needed is not None:
                raise InputError(f"{_option(name)} does nothing by itself: add {needed}, or leave it out")

    def _check_precision(self) -> None:
        check_choice("--mixed-precision", self.mixed_precision, PRECISIONS)
        if self.mixed_precision == "fp16" and torch.device(self.device).type == "cpu":
            raise InputError("--mixed-precision: fp16 needs a GPU; use no or bf16 on the CPU")
        check_choice("--weights-dtype", self.weights_dtype, WEIGHTS_DTYPES)
        if self.weights_dtype == "bfloat16" and self.mixed_precision == "fp16":
            raise InputError("--weights-dtype bfloat16 computes in bf16: leave out --mixed-precision fp16")
        for name, needs_all in (
            ("gradient_accumulation_steps", self.gradient_accumulation_steps > 1),
            ("mixed_precision fp16", self.mixed_precision == "fp16"),
        ):
            if self.optimizer_in_backward and needs_all:
                raise InputError(
                    f"--optimizer-in-backward frees each gradient at once, and {_option(name)} needs all of them: "
                    "leave one of them out"
                )

    def _check_mask(self) -> None:
        check_storage("--fisher-storage", self.fisher_storage, gamma=self.mask is None and self.mask_fraction is None)
        check_choice("--parallel", self.parallel, PARALLEL)
        sources = [n for n in ("gamma", "mask_fraction", "mask") if getattr(self, n) is not None]
        if len(sources) > 1:
            raise InputError(f"{' and '.join(map(_option, sources))} each say which weights are masked: give only one")
        if self.mask is not None and not self.mask.is_file():
            raise InputError(f"--mask: there is no file {self.mask}")
        if self.mask is not None and self.fisher_batches is not None:
            raise InputError("--fisher-batches is for measuring a mask, and --mask gives one: leave one of them out")

    def _check_judges(self) -> None:
        if self.classifier is not None and not (self.classifier / "config.json").is_file():
            raise InputError(
                f"--classifier: expected a transformers image-classification folder with a config.json, got "
                f"{self.classifier}"
            )
        if self.fid_weights is not None:
            try:
                check_file(self.fid_weights)
            except InputError as error:
                raise InputError(f"--fid-weights: {error}") from None

    def settings(self) -> dict[str, Any]:
        """Of plain types, for the result."""
        return json.loads(json.dumps(self.__dict__, default=str))


def each_of(value: Any) -> tuple[Any, ...]:
    """The values of an option that may be given more than once."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
