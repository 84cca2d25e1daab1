"""What a model is conditioned on and predicts, by its configuration: nothing that it needs may be dropped silently."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .layout import INDEX, named_part, part_names
from .reading import import_diffusers, named_class

__all__ = ["check_components", "check_denoiser", "check_pipeline", "check_scheduler", "check_vae"]

# Parts of a pipeline that are used, or that only its owner's code uses, by the kind of its denoiser.
_USED = {
    "class": {"transformer", "unet", "scheduler", "vae", "safety_checker", "feature_extractor"},
    "text": {
        "unet",
        "scheduler",
        "vae",
        "text_encoder",
        "tokenizer",
        "safety_checker",
        "feature_extractor",
        "image_encoder",  # of adapters that show pictures; Stable Diffusion without them leaves it alone
    },
}
_SUPPORTED = "expected a DiTPipeline, a StableDiffusionPipeline, or a DDPMPipeline with a class-conditional UNet2DModel"
# Library and class of the parts that are opened; None where each class has its own check.
_CLASSES = {
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "scheduler": ("diffusers", None),
    "tokenizer": ("transformers", None),
}
_PIPELINES = {  # the denoiser -> pipelines that are made of it and the parts that are opened with it
    "DiTTransformer2DModel": ("DiTPipeline",),
    "UNet2DModel": ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline"),
    "UNet2DConditionModel": (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionPipelineSafe",
    ),
}
# A setting of the denoiser -> what it is conditioned on where that is not None or one of these.
_CONDITIONS: dict[str, dict[str, tuple[str, tuple[Any, ...]]]] = {
    "UNet2DConditionModel": {
        "addition_embed_type": ("more than one prompt embedding (SDXL and its like)", ()),
        "time_cond_proj_dim": ("a guidance scale (a distilled consistency model)", ()),
        "encoder_hid_dim_type": ("pictures beside or in place of prompts", ("text_proj",)),
        "class_embed_type": ("class embeddings beside prompts", ()),
        "num_class_embeds": ("classes beside prompts", ()),
        "attention_type": ("boxes or pictures beside prompts (GLIGEN)", ("default",)),
        "dual_cross_attention": ("two kinds of embeddings", (False,)),
    },
    "UNet2DModel": {"class_embed_type": ("classes in another way than by a table of embeddings", ())},
    "DiTTransformer2DModel": {
        "cross_attention_dim": ("prompts", ()),
        "caption_channels": ("prompts (PixArt)", ()),
        "num_vector_embeds": ("discrete latents (VQ diffusion)", ()),
        "use_additional_conditions": ("sizes and aspect ratios", (False,)),
    },
}
_DISTILLED = ("LCMScheduler", "TCDScheduler", "CMStochasticIterativeScheduler")


def check_components(folder: Path, index: Mapping[str, Any], kind: str) -> None:
    """Refuses a pipeline with parts that a run would not use, such as a VQ-VAE, a ControlNet or a second text encoder,
    or with parts of other classes than those that are opened.

    Args:
        index: of ``model_index.json``.
        kind: of the denoiser, ``class`` or ``text``.

    Raises:
        InputError: with the part and its class.
    """
    for key in part_names(index):
        library, name = named_part(index, key)
        if key in _USED[kind]:
            right, expected = _CLASSES.get(key, (library, None))
            if library != right or expected not in (None, name):
                raise InputError(
                    f"{folder} has a {key} that is a {name} of {library} by its {INDEX}, which is not supported: "
                    f"expected {expected or 'one'} of {right}"
                )
            continue
        why = ""
        if key in ("vqvae", "movq"):
            why = "its denoiser works on the VQ-VAE's latents, and would be trained on pixels; "
        raise InputError(
            f"{folder} is a {named_class(index) or 'pipeline'} with a {key} ({name}), which is not supported: "
            f"{why}{_SUPPORTED}"
        )


def check_pipeline(folder: Path, index: Mapping[str, Any], denoiser: str) -> str | None:
    """Refuses a pipeline of diffusers that is not made of this denoiser and what is opened with it, such as an SDXL
    pipeline over the parts of Stable Diffusion.

    Returns:
        A sentence on a pipeline that diffusers does not have, whose own code may do other things with the same parts.

    Raises:
        InputError: with its class and those that can be.
    """
    value, expected = index.get("_class_name"), _PIPELINES[denoiser]
    name = value[-1] if isinstance(value, list) and value else value  # of own code: its module and its class
    if name in expected and name is value:
        return None
    if isinstance(value, str) and value in dir(import_diffusers()):
        raise InputError(
            f"{folder} is a {value} by its {INDEX}, which is not supported with a {denoiser}: expected "
            f"{' or '.join(expected)}; correct _class_name if its parts are of such a pipeline"
        )
    which = "no pipeline" if not isinstance(name, str) else f"the pipeline {name[:100]}, which diffusers does not have"
    return f"{INDEX} names {which}: its parts are taken for those of a {expected[0]}"


def check_denoiser(home: Path, name: str, config: Mapping[str, Any]) -> None:
    """Refuses a denoiser that needs other conditions than its label or prompt, or other inputs than noisy samples.

    Args:
        home: its folder.
        name: the class that loads it.
        config: of ``config.json``, or of the model.

    Raises:
        InputError: with what it needs.
    """
    for key, (what, harmless) in _CONDITIONS[name].items():
        value = config.get(key)
        if value is not None and value not in harmless:
            raise InputError(
                f"the denoiser in {home} is conditioned on {what} ({key} = {value!r}), which is not supported: only "
                "the denoisers of DiT, DDPM, and Stable Diffusion 1 and 2 are"
            )
    inputs, outputs = config.get("in_channels"), config.get("out_channels")
    if isinstance(inputs, int) and isinstance(outputs, int) and outputs not in (inputs, 2 * inputs):
        raise InputError(
            f"the denoiser in {home} takes {inputs} channels and predicts {outputs}: models for inpainting, "
            "super-resolution, depth and the like are not supported"
        )
    size = config.get("sample_size")
    sides = size if isinstance(size, (list, tuple)) else [size, size]
    if size is not None and (len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides)):
        raise InputError(f"the denoiser in {home} has the sample_size {size!r}: expected one whole number or two")
    if name == "DiTTransformer2DModel" and isinstance(size, (list, tuple)):
        raise InputError(f"the denoiser in {home} has the sample_size {size!r}: a DiT's is one whole number")


def check_vae(home: Path, config: Mapping[str, Any]) -> None:
    """Refuses a VAE whose latents are shifted or scaled by channel: they would be trained on as they are.

    Raises:
        InputError: with the setting.
    """
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if config.get(key) not in (None, 0, 0.0):
            raise InputError(
                f"the VAE in {home} has a {key}, which is not supported: only the VAEs of DiT and of Stable Diffusion "
                "1 and 2 are"
            )
    factor = config.get("scaling_factor")
    if factor is not None and not (type(factor) in (int, float) and 0 < factor < math.inf):
        raise InputError(f"the VAE in {home} has the scaling_factor {factor!r}: expected a number above 0")


def check_scheduler(home: Path, scheduler: Any) -> None:
    """Refuses schedulers of models that predict no noise, sample or velocity, or that DDIM cannot sample.

    Raises:
        InputError: with the scheduler's class.
    """
    name, config = type(scheduler).__name__, scheduler.config
    products = getattr(scheduler, "alphas_cumprod", None)
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        raise InputError(
            f"the scheduler of {home}, a {name}, is of a flow-matching model and has no alphas_cumprod that count: "
            "expected one of a model that predicts noise, such as DDPMScheduler"
        )
    if not isinstance(products, Tensor):
        raise InputError(
            f"the scheduler of {home}, a {name}, has no alphas_cumprod: expected one of a model that predicts noise, "
            "such as DDPMScheduler"
        )
    if name in _DISTILLED:
        raise InputError(
            f"the scheduler of {home}, a {name}, is of a consistency model, which training as a noise predictor would "
            "undo: give the model that it was distilled from"
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise InputError(
            f"the scheduler of {home} has the prediction_type {prediction!r}: expected epsilon, v_prediction or sample"
        )
    if prediction == "epsilon" and config.get("rescale_betas_zero_snr"):
        raise InputError(
            f"the scheduler of {home} leaves no signal at its last step (rescale_betas_zero_snr), where noise says "
            "nothing of the sample: its prediction_type must be v_prediction or sample, not epsilon"
        )
    _check_ddim(home, scheduler, products)


def _check_ddim(home: Path, scheduler: Any, products: Tensor) -> None:
    """Pictures are sampled by DDIM, made from the configuration alone."""
    name, kind = type(scheduler).__name__, import_diffusers().DDIMScheduler
    try:
        sampled = kind.from_config(scheduler.config).alphas_cumprod
        same = sampled.shape == products.shape and torch.allclose(sampled, products.to(sampled), rtol=0, atol=1e-6)
    except Exception:  # of a configuration of another kind
        same = False
    if not same:
        raise InputError(
            f"the scheduler of {home}, a {name}, adds noise in another way than DDIM, by which pictures are sampled: "
            "expected DDPMScheduler, DDIMScheduler, PNDMScheduler or their like"
        )
