"""What the preset and the options make of a run: method, task, averages, tied embedders, guidance of the pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..errors import InputError
from ..methods import SFRon
from ..models.weights import tie_embeddings
from ..saliency import SaliencyMask
from ..tasks import ClassConditionalDiffusion, Task, TextConditionalDiffusion
from .opening import Opened

__all__ = ["averages_decay", "guidance_for_pictures", "make_method", "make_task", "task_settings", "tie_embedders"]


def make_method(opened: Opened) -> SFRon:
    """The preset's, with what the options change; at most a pass over each set is measured for the mask."""
    options = opened.options
    changes: dict[str, Any] = {
        "iterations": options.max_train_steps,
        "lr": options.learning_rate,
        "forget_alpha": options.forget_alpha,
        "gamma": options.gamma,
        "mask_fraction": options.mask_fraction,
        "fisher_batches": options.fisher_batches,
        "mask": None if options.mask is None else SaliencyMask.load(options.mask),
        "stochastic_rounding": opened.in_bfloat16 or None,
    }
    method = SFRon.preset(opened.preset, **{name: value for name, value in changes.items() if value is not None})
    if method.replaces != (opened.pretrained.kind == "text"):
        inputs = "prompts" if opened.pretrained.kind == "text" else "classes"
        raise InputError(f"--preset {opened.preset} is for other models than those that are told {inputs}")
    if method.needs_fisher:  # else loaders that the iterations made long would be measured whole
        return replace(method, fisher_batches=_limit_fisher(opened, method))
    return method


def _limit_fisher(opened: Opened, method: SFRon) -> tuple[int, int]:
    """Batches of the forget and of the retain set that are measured: at most a pass over each."""
    forget = int(torch.isin(opened.data.labels, torch.tensor(opened.forget_classes, device="cpu")).sum())
    whole = [-(-count // opened.batch_size) for count in (forget, len(opened.data) - forget)]
    forget, retain = (min(n, limit or n) for n, limit in zip(whole, method.fisher_limits, strict=True))
    return max(1, forget), max(1, retain)  # a set without images is refused when batches are drawn


def task_settings(opened: Opened) -> dict[str, Any]:
    """Keyword arguments of the task that are plain numbers and texts, as the result holds them."""
    pretrained, preset = opened.pretrained, opened.domain["task"]
    settings: dict[str, Any] = {
        "reduction": preset["reduction"],
        "guidance": preset["guidance"],
        "antithetic": preset.get("antithetic", False),
        "scaling_factor": pretrained.scaling_factor,
        "seed": opened.options.seed,
    }
    if pretrained.kind == "text":
        return settings | {"prompt_dropout": preset.get("prompt_dropout", 0.0)}
    settings["label_dropout"] = preset.get("label_dropout", 0.0)
    if not pretrained.classes.has_null:
        settings.update(label_dropout=0.0, guidance=None)
    return settings


def make_task(opened: Opened) -> Task:
    """How a batch becomes losses, with :func:`task_settings`."""
    pretrained, settings = opened.pretrained, task_settings(opened)
    if pretrained.kind == "text":
        return TextConditionalDiffusion(pretrained.scheduler, pretrained.text_encoder, pretrained.tokenizer, **settings)
    return ClassConditionalDiffusion(pretrained.scheduler, null_label=pretrained.classes.null_label, **settings)


def averages_decay(opened: Opened) -> float | None:
    """Decay of the moving averages that are saved; None where the last weights are."""
    options = opened.options
    if options.save_weights == "last":
        return None
    decay = opened.domain["run"]["ema_decay"] if options.ema_decay is None else options.ema_decay
    if decay is None:
        raise InputError(f"--save-weights ema needs --ema-decay: the preset {opened.preset} keeps no averages")
    return decay


def tie_embedders(opened: Opened) -> bool:
    """Whether a DiT's embedder copies are one for the run; ties them."""
    tie, has_copies = opened.options.tie_embeddings, hasattr(opened.model, "transformer_blocks")
    if tie and not has_copies:
        raise InputError(f"--tie-embeddings: a {type(opened.model).__name__} has no embedder copies; leave it out")
    if not has_copies or tie is False or (tie is None and not opened.domain["run"].get("tie_embeddings")):
        return False
    try:
        tie_embeddings(opened.model)
    except InputError as error:
        raise InputError(f"{error}: use --no-tie-embeddings to train them as copies") from None
    return True


def guidance_for_pictures(opened: Opened) -> float | None:
    """Guidance of the pictures before and after; None without."""
    guidance = opened.options.guidance_scale
    without_null = opened.pretrained.classes is not None and not opened.pretrained.classes.has_null
    if without_null and guidance not in (None, 1.0):
        raise InputError("--guidance-scale needs a null class, and the model has none: leave it out")
    if guidance is not None or without_null:
        return guidance
    return opened.domain["run"].get("guidance_for_pictures", opened.domain["task"].get("guidance"))
