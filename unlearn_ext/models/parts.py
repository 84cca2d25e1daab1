"""The parts of a pipeline, each opened from its own folder. Nothing is downloaded, and no code of a folder runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .adapters import check_adapter_files
from .conditioning import check_scheduler, check_vae
from .reading import as_input_error, check_finite, check_loaded, check_sizes, import_diffusers, named_class, read_config
from .variants import DIFFUSERS, TRANSFORMERS, Weights, find_weights

__all__ = ["open_denoiser", "open_scheduler", "open_text_encoder", "open_tokenizer", "open_vae"]


def open_denoiser(name: str, home: Path, dtype: torch.dtype) -> tuple[nn.Module, Weights]:
    """The model, of class ``name``, and which of its files were read."""
    model, weights, info = _open_model(name, home, "denoiser", dtype)
    extra = sorted(str(key) for key in info.get("unexpected_keys") or ())
    if extra:
        raise InputError(
            f"the weights of the denoiser in {home} hold {extra[0]}, which the model that its config.json describes "
            "does not have: it is another model"
        )
    return model, weights


def open_vae(home: Path, dtype: torch.dtype) -> tuple[nn.Module, Weights]:
    """An AutoencoderKL, and which of its files were read."""
    name = named_class(read_config(home / "config.json")) if (home / "config.json").is_file() else "AutoencoderKL"
    if name != "AutoencoderKL":
        raise InputError(f"the VAE in {home} is a {name}: expected AutoencoderKL")
    model, weights, _ = _open_model("AutoencoderKL", home, "VAE", dtype)
    check_vae(home, model.config)
    return model, weights


def _open_model(name: str, home: Path, what: str, dtype: torch.dtype) -> tuple[nn.Module, Weights, Mapping[str, Any]]:
    weights = find_weights(home, what, DIFFUSERS)
    check_adapter_files(home)
    check_sizes(home / "config.json", read_config(home / "config.json"))
    with as_input_error(home, what):
        model, info = getattr(import_diffusers(), name).from_pretrained(
            home,
            variant=weights.variant,
            torch_dtype=dtype,
            use_safetensors=weights.safetensors,
            local_files_only=True,
            output_loading_info=True,
        )
    check_loaded(home, what, info)
    check_finite(home, what, model)
    return model, weights, info


def open_text_encoder(home: Path, dtype: torch.dtype) -> tuple[nn.Module, Weights]:
    """A CLIPTextModel, and which of its files were read."""
    from transformers import CLIPTextModel

    weights = find_weights(home, "text encoder", TRANSFORMERS)
    check_adapter_files(home)  # transformers would open what it names in place of this model
    config = read_config(home / "config.json")
    check_sizes(home / "config.json", config)
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and "CLIPTextModel" not in architectures:
        raise InputError(f"the text encoder in {home} is a {architectures[0]}: expected CLIPTextModel")
    with as_input_error(home, "text encoder"):
        model, info = CLIPTextModel.from_pretrained(
            home,
            variant=weights.variant,
            dtype=dtype,
            use_safetensors=weights.safetensors,
            weights_only=True,
            local_files_only=True,
            output_loading_info=True,
        )
    check_loaded(home, "text encoder", info)
    check_finite(home, "text encoder", model)
    return model, weights


def open_tokenizer(home: Path, index: Mapping[str, Any] | None, encoder: nn.Module | None) -> Any:
    """A tokenizer of the class that the pipeline's index names, or its own configuration, or else CLIP's.

    Raises:
        InputError: the two name different classes, or it does not go with the text encoder.
    """
    name = _tokenizer_class(home, index)
    import transformers

    with as_input_error(home, "tokenizer"):
        tokenizer = getattr(transformers, name).from_pretrained(home, local_files_only=True)
    if len(tokenizer) < 3:  # transformers makes one of the special tokens alone where the vocabulary is missing
        raise InputError(f"the tokenizer in {home} has no vocabulary: add its vocab.json and merges.txt")
    if tokenizer.pad_token is None:
        raise InputError(f"the tokenizer in {home} has no padding token: set pad_token in its tokenizer_config.json")
    known = getattr(getattr(encoder, "config", None), "vocab_size", None)
    if known is not None and len(tokenizer) > known:
        raise InputError(
            f"the tokenizer in {home} has {len(tokenizer)} tokens and the text encoder embeddings of {known}: get the "
            "text encoder that belongs to it"
        )
    return tokenizer


def _tokenizer_class(home: Path, index: Mapping[str, Any] | None) -> str:
    file = home / "tokenizer_config.json"
    value = (index or {}).get("tokenizer")
    by_index = value[1] if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str) else None
    by_config = read_config(file).get("tokenizer_class") if file.is_file() else None
    names = [str(name) for name in (by_index, by_config) if name is not None]
    kinds = [_tokenizer(home, name) for name in names]
    if len(kinds) == 2 and kinds[0] is not kinds[1] and len({name.removesuffix("Fast") for name in names}) == 2:
        raise InputError(
            f"the tokenizer in {home} is a {by_index} by the pipeline's model_index.json and a {by_config} by its own "
            "tokenizer_config.json: correct one of them"
        )
    return names[0] if names else "CLIPTokenizer"


def _tokenizer(home: Path, name: str) -> type:
    import transformers

    with as_input_error(home, "tokenizer"):
        kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerBase)):
        raise InputError(f"the tokenizer in {home} is a {name}, which this transformers does not have: name another")
    return kind


def open_scheduler(folder: Path, place: str, index: Mapping[str, Any] | None) -> Any:
    """The scheduler beside a model, from its ``scheduler_config.json``.

    Args:
        place: of the denoiser in ``folder``; empty where it is the folder itself.
        index: of the pipeline, if there is one.
    """
    diffusers = import_diffusers()
    homes = [folder / "scheduler", folder]
    if index is None and not place:  # the model's own folder within a pipeline
        homes.append(folder.parent / "scheduler")
    home = next((home for home in homes if (home / "scheduler_config.json").is_file()), None)
    if home is None:
        raise InputError(
            f"{folder} has no scheduler: it needs {Path('scheduler', 'scheduler_config.json')}, as a scheduler's "
            "save_pretrained writes it"
        )
    config = read_config(home / "scheduler_config.json")
    check_sizes(home / "scheduler_config.json", config)
    value = (index or {}).get("scheduler")
    name = value[1] if isinstance(value, list) and len(value) == 2 and value[1] else named_class(config)
    with as_input_error(home, "scheduler"):
        kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise InputError(f"the scheduler of {home} is a {name}, which this diffusers does not have: name another")
    with as_input_error(home, "scheduler"):
        scheduler = kind.from_pretrained(home, local_files_only=True)
    check_scheduler(home, scheduler)
    return scheduler
