"""Opens a folder in diffusers' layout and names its denoiser."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from ..distributed.wrappers import unwrapped
from ..errors import InputError
from ..utils.files import user_path
from .adapters import check_adapter_files
from .conditioning import check_components, check_denoiser, check_pipeline
from .converting import how_to_convert
from .layout import COMPONENTS, INDEX, PICKLES, is_weights, named_part, part_names
from .links import check_links
from .parts import open_denoiser, open_scheduler, open_text_encoder, open_tokenizer, open_vae
from .reading import check_id2label, import_diffusers, named_class, read_config
from .variants import DIFFUSERS, Weights, find_weights, note_pickles

__all__ = ["Classes", "Pretrained", "open_pretrained"]

_DENOISERS = {  # a class of diffusers -> the class that loads it, and how it is conditioned
    "DiTTransformer2DModel": ("DiTTransformer2DModel", "class"),
    "Transformer2DModel": ("DiTTransformer2DModel", "class"),  # what released DiT folders call it
    "UNet2DModel": ("UNet2DModel", "class"),
    "UNet2DConditionModel": ("UNet2DConditionModel", "text"),
}


@dataclass(frozen=True)
class Classes:
    """The classes that a model knows: 0 to ``count`` − 1, and a label that stands for none, if there is one."""

    count: int
    null_label: int | None

    @property
    def has_null(self) -> bool:
        return self.null_label is not None


@dataclass
class Pretrained:
    """A diffusers folder, opened.

    Attributes:
        folder: where it lies.
        denoiser: ``UNet2DModel``, ``DiTTransformer2DModel`` or ``UNet2DConditionModel``, in evaluation mode.
        denoiser_folder: ``transformer``, ``unet``, or empty where the folder is the model itself.
        scheduler: of diffusers.
        vae, text_encoder: frozen and in evaluation mode; None where there is none.
        tokenizer: None where there is none.
        kind: ``class`` or ``text``, by what the denoiser is conditioned.
        classes: None for ``text``.
        id2label: class -> text, synonyms separated by commas; empty where the folder has none.
        pipeline: the class named in ``model_index.json``; None without one.
        variant: of the denoiser's weight files, such as ``fp16``; None where they are plain.
        names: of the denoiser's tensors.
        notes: sentences on what was taken otherwise than it stands there, for the plan.
    """

    folder: Path
    denoiser: nn.Module
    denoiser_folder: str
    scheduler: Any
    kind: str
    vae: nn.Module | None = None
    text_encoder: nn.Module | None = None
    tokenizer: Any = None
    classes: Classes | None = None
    id2label: dict[int, str] = field(default_factory=dict)
    pipeline: str | None = None
    variant: str | None = None
    names: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, h, w] of what the denoiser takes: latents, or images where there is no VAE."""
        config = unwrapped(self.denoiser).config
        size = config.sample_size
        if size is None:
            raise InputError(f"the configuration of {self.folder / self.denoiser_folder} has no sample_size: add it")
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """[C, H, W] of images; None where the model takes latents only, because its VAE is not there."""
        channels, height, width = self.latent_shape
        if self.vae is None:
            return (channels, height, width) if channels in (1, 3) else None
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.in_channels, height * factor, width * factor

    @property
    def scaling_factor(self) -> float:
        """Of the VAE; 1 without one."""
        return 1.0 if self.vae is None else float(self.vae.config.scaling_factor or 1.0)

    def data_settings(self) -> dict[str, Any]:
        """What :func:`unlearn_ext.data.open_data` is to be called with."""
        settings: dict[str, Any] = {
            "classes": None if self.classes is None else self.classes.count,
            "id2label": self.id2label,
        }
        if self.image_shape is not None:
            settings.update(channels=self.image_shape[0], size=self.image_shape[1:])
        if self.vae is not None or self.image_shape is None:
            settings.update(latent_channels=self.latent_shape[0], latent_size=self.latent_shape[1:])
        return settings


# --- Opening ------------------------------------------------------------------------------------------------


def open_pretrained(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    null_class: bool | None = True,
) -> Pretrained:
    """Opens a local folder: a pipeline with ``model_index.json``, or a model with ``config.json``, weights and a
    ``scheduler`` folder.

    Nothing is downloaded, and no code of the folder runs: where there are no safetensors, ``.bin`` files are read by
    torch with ``weights_only``. A name such as ``facebook/DiT-XL-2-256`` means the copy in the local hub cache.

    Args:
        dtype: of the weights in memory.
        null_class: whether the last embedding of a ``UNet2DModel`` stands for no class, as guidance needs it; its
            files do not tell. None leaves it open: ``classes`` are then as if there were one, and yours to put right.
            A DiT always has one.

    Raises:
        InputError: no such folder, or one that cannot be used; the sentence says why.
    """
    import_diffusers()
    folder = _find(path)
    index = read_config(folder / INDEX) if (folder / INDEX).is_file() else None
    if index is not None:
        place, name = _denoiser_of_pipeline(folder, index)
    else:
        place, name = _denoiser_of_folder(folder)
    home = folder / place
    loaded_by, kind = _DENOISERS[name]
    notes = [_check_is_whole(folder, place, index, loaded_by, kind)]
    find_weights(home, "denoiser", DIFFUSERS)  # before anything large is opened
    config = read_config(home / "config.json")
    if "_class_name" in config and _DENOISERS.get(str(config["_class_name"]), ("",))[0] != loaded_by:
        raise InputError(f"the denoiser in {home} is a {config['_class_name']}: expected {loaded_by}")
    check_denoiser(home, loaded_by, config)
    scheduler = open_scheduler(folder, place, index)
    read: dict[str, Weights] = {}
    vae = _open_vae(folder, index, kind, dtype, read)
    text_encoder, tokenizer = _open_text_parts(folder, index, dtype, read) if kind == "text" else (None, None)
    denoiser, weights = open_denoiser(loaded_by, home, dtype)
    check_denoiser(home, loaded_by, denoiser.config)  # with what its file leaves to the class
    if vae is not None and vae.config.latent_channels != denoiser.config.in_channels:
        raise InputError(
            f"the denoiser of {folder} takes {denoiser.config.in_channels} channels and its VAE gives "
            f"{vae.config.latent_channels}: models for inpainting and the like are not supported"
        )
    classes = _classes(denoiser, home, null_class) if kind == "class" else None
    id2label: dict[int, str] = {}
    if classes is not None and index is not None:
        id2label, note = check_id2label(folder / INDEX, index.get("id2label"), classes.count, classes.null_label)
        notes.append(note)
    notes.append(note_pickles({"denoiser": weights} | read))
    return Pretrained(
        folder=folder,
        denoiser=denoiser.to(device).eval(),
        denoiser_folder=place,
        scheduler=scheduler,
        kind=kind,
        vae=None if vae is None else _frozen(vae, device),
        text_encoder=None if text_encoder is None else _frozen(text_encoder, device),
        tokenizer=tokenizer,
        classes=classes,
        id2label=id2label,
        pipeline=None if index is None else named_class(index),
        variant=weights.variant,
        names=frozenset(denoiser.state_dict()),
        notes=tuple(note for note in notes if note is not None),
    )


def _open_vae(
    folder: Path, index: Mapping[str, Any] | None, kind: str, dtype: torch.dtype, read: dict[str, Weights]
) -> nn.Module | None:
    """The VAE, if there is one; adds its weight files to ``read``."""
    home = _component(folder, index, "vae", needed=index is not None and ("vae" in index or kind == "text"))
    if home is None:
        return None
    vae, read["VAE"] = open_vae(home, dtype)
    return vae


def _open_text_parts(
    folder: Path, index: Mapping[str, Any] | None, dtype: torch.dtype, read: dict[str, Weights]
) -> tuple[nn.Module | None, Any]:
    """Text encoder and tokenizer, each if there is one; adds the encoder's weight files to ``read``."""
    needed, encoder, tokenizer = index is not None, None, None
    encoder_home = _component(folder, index, "text_encoder", needed=needed)
    tokenizer_home = _component(folder, index, "tokenizer", needed=needed)
    if encoder_home is not None:
        encoder, read["text encoder"] = open_text_encoder(encoder_home, dtype)
    if tokenizer_home is not None:
        tokenizer = open_tokenizer(tokenizer_home, index, encoder)
    return encoder, tokenizer


def _find(path: str | Path) -> Path:
    folder = user_path(path)
    if os.path.isdir(folder):  # which, unlike pathlib, takes names of any length
        return folder
    if os.path.isfile(folder) and not is_weights(PurePosixPath(folder)):
        raise InputError(f"{folder} is a file, and a folder in diffusers' layout is needed: give the one that holds it")
    if os.path.isfile(folder):
        what = "a checkpoint in pickle form, which may run code" if folder.suffix.lower() in PICKLES else "a file"
        raise InputError(f"{folder} is {what}, and a folder in diffusers' layout is needed: {how_to_convert(folder)}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        from huggingface_hub import snapshot_download

        with contextlib.suppress(Exception):  # not in the cache, for whatever reason
            return Path(snapshot_download(str(path), local_files_only=True))
    raise InputError(f"there is no folder {path}, and no model of that name in the local hub cache: download it first")


def _check_is_whole(folder: Path, place: str, index: Mapping[str, Any] | None, denoiser: str, kind: str) -> str | None:
    """Whether the denoiser is all that the folder needs, and all of it lies in the folder; a sentence for the plan."""
    parts = sorted({place, "scheduler", *COMPONENTS, *part_names(index or {})} - {""})
    files = {INDEX, "config.json", "scheduler_config.json"}
    weights = set() if place else {name for name in os.listdir(folder) if is_weights(PurePosixPath(name))}
    check_links(folder, sorted({*parts} | files | weights))
    check_adapter_files(folder, *(folder / part for part in parts))
    if index is not None:
        check_components(folder, index, kind)
        return check_pipeline(folder, index, denoiser)
    if not place and (folder.parent / INDEX).is_file():  # a part of a pipeline by itself
        pipeline = read_config(folder.parent / INDEX)
        if folder.name in part_names(pipeline):
            check_components(folder.parent, pipeline, kind)
            return check_pipeline(folder.parent, pipeline, denoiser)
    for name in ("vqvae", "movq"):
        if (folder / name).is_dir():
            check_components(folder, {name: ["diffusers", "VQModel"]}, kind)
    return None


def _denoiser_of_pipeline(folder: Path, index: Mapping[str, Any]) -> tuple[str, str]:
    for place in ("transformer", "unet"):
        library, name = named_part(index, place)
        if name is None:
            continue
        if library != "diffusers" or name not in _DENOISERS:
            break
        if named_part(index, "text_encoder_2")[1] is not None:
            break
        return place, name
    raise InputError(
        f"{folder} is a {named_class(index) or 'pipeline'}, which is not supported: expected a DiTPipeline, a "
        "StableDiffusionPipeline, or a DDPMPipeline with a class-conditional UNet2DModel"
    )


def _denoiser_of_folder(folder: Path) -> tuple[str, str]:
    for place in ("", "transformer", "unet"):
        config = folder / place / "config.json"
        if not config.is_file():
            continue
        check_adapter_files(folder / place)
        name = named_class(read_config(config))
        if name in _DENOISERS:
            return place, name
        what = "no model of diffusers" if name is None else f"a {name}"
        raise InputError(f"{folder / place} holds {what}: expected {', '.join(dict.fromkeys(_DENOISERS))}")
    check_adapter_files(folder)
    pickled = [entry for entry in sorted(folder.iterdir()) if entry.suffix.lower() in PICKLES]
    if pickled:
        raise InputError(
            f"{folder} holds {pickled[0].name}, a checkpoint in pickle form, which may run code: "
            f"{how_to_convert(pickled[0])}"
        )
    single = next((entry for entry in sorted(folder.iterdir()) if entry.suffix.lower() == ".safetensors"), None)
    how = "" if single is None else f"; if {single.name} is a whole model, {how_to_convert(single)}"
    raise InputError(f"{folder} is no diffusers folder: it has neither {INDEX} nor a model's config.json{how}")


def _component(folder: Path, index: Mapping[str, Any] | None, key: str, *, needed: bool) -> Path | None:
    home = folder / key
    there = home.is_dir() and any(home.iterdir())
    if index is not None and not needed:
        return home if there and named_part(index, key)[1] is not None else None
    if needed and (not there or named_part(index or {}, key)[1] is None):
        what = {"vae": "VAE", "text_encoder": "text encoder"}.get(key, key)
        raise InputError(f"the {what} of {folder} is missing: its model needs a folder {key} beside it")
    return home if there else None


def _frozen(model: nn.Module, device: str | torch.device) -> nn.Module:
    return model.to(device).eval().requires_grad_(False)


def _classes(denoiser: nn.Module, home: Path, null_class: bool | None) -> Classes:
    config = denoiser.config
    if "num_embeds_ada_norm" in config:
        return Classes(config.num_embeds_ada_norm, config.num_embeds_ada_norm)
    embeds = config.num_class_embeds
    if embeds is None or getattr(config, "class_embed_type", None) is not None:
        raise InputError(
            f"the UNet2DModel in {home} is not conditioned on classes (num_class_embeds): it cannot forget one"
        )
    if embeds < 2 + bool(null_class):
        but = ", one of them for no class unless you say otherwise (null_class, --no-null-class)" if null_class else ""
        raise InputError(f"the UNet2DModel in {home} has {embeds} class embeddings{but}: too few to forget one of")
    return Classes(embeds, None) if null_class is False else Classes(embeds - 1, embeds - 1)
