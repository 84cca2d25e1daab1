"""Opens a folder in diffusers' layout, names its denoiser, and writes a folder in which only that one differs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from .._files import atomic_directory, follow_umask, user_path
from .._leftovers import is_leftover
from .._names import own_names, unwrapped
from ..data.labels import label_names, parse_classes, whole_number
from ..errors import InputError
from .adapters import check_adapter_files
from .conditioning import check_components, check_denoiser
from .converting import how_to_convert
from .links import check_links, leaves
from .parts import open_denoiser, open_scheduler, open_text_encoder, open_tokenizer, open_vae
from .reading import import_diffusers, named_class, read_config
from .variants import DIFFUSERS, find_weights

__all__ = [
    "OWN_FOLDER",
    "Classes",
    "Plan",
    "Pretrained",
    "check_output",
    "open_pretrained",
    "plan_result",
    "write_result",
]

_INDEX = "model_index.json"
_DENOISERS = {  # a class of diffusers -> the class that loads it, and how it is conditioned
    "DiTTransformer2DModel": ("DiTTransformer2DModel", "class"),
    "Transformer2DModel": ("DiTTransformer2DModel", "class"),  # what released DiT folders call it
    "UNet2DModel": ("UNet2DModel", "class"),
    "UNet2DConditionModel": ("UNet2DConditionModel", "text"),
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHTS = (*_PICKLES, ".safetensors", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".gguf")
_WEIGHTS_INDEX = re.compile(r"\.index(\..+)?\.json$")
OWN_FOLDER = "unlearning"  # in a result: result.json, pictures, mask, history
# What a clone or a download leaves in a folder, and the record of an earlier run.
_NOT_OF_THE_MODEL = (".git", ".cache", "__pycache__", OWN_FOLDER)
_COMPONENTS = ("vae", "text_encoder", "tokenizer", "scheduler", "feature_extractor", "safety_checker", "image_encoder")


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

    def parse_classes(self, text: str | int | Iterable[str | int]) -> list[int]:
        """``"3, tench"`` -> classes, by index or label text."""
        if self.classes is None:
            raise InputError(f"{self.folder} is a text-conditional model and has no classes: name a prompt to forget")
        return parse_classes(text, self.classes.count, label_names(self.id2label))


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
    index = read_config(folder / _INDEX) if (folder / _INDEX).is_file() else None
    if index is not None:
        place, name = _denoiser_of_pipeline(folder, index)
    else:
        place, name = _denoiser_of_folder(folder)
    home = folder / place
    loaded_by, kind = _DENOISERS[name]
    _check_is_whole(folder, place, index, kind)
    find_weights(home, "denoiser", DIFFUSERS)  # before anything large is opened
    config = read_config(home / "config.json")
    if "_class_name" in config and _DENOISERS.get(str(config["_class_name"]), ("",))[0] != loaded_by:
        raise InputError(f"the denoiser in {home} is a {config['_class_name']}: expected {loaded_by}")
    check_denoiser(home, loaded_by, config)
    scheduler = open_scheduler(folder, place, index)
    vae_home = _component(folder, index, "vae", needed=index is not None and ("vae" in index or kind == "text"))
    vae = text_encoder = tokenizer = None
    if vae_home is not None:
        vae = _frozen(open_vae(vae_home, dtype), device)
    if kind == "text":
        needed = index is not None
        encoder_home = _component(folder, index, "text_encoder", needed=needed)
        tokenizer_home = _component(folder, index, "tokenizer", needed=needed)
        if encoder_home is not None:
            text_encoder = _frozen(open_text_encoder(encoder_home, dtype), device)
        if tokenizer_home is not None:
            tokenizer = open_tokenizer(tokenizer_home, index, text_encoder)
    denoiser, weights = open_denoiser(loaded_by, home, dtype)
    check_denoiser(home, loaded_by, denoiser.config)  # with what its file leaves to the class
    if vae is not None and vae.config.latent_channels != denoiser.config.in_channels:
        raise InputError(
            f"the denoiser of {folder} takes {denoiser.config.in_channels} channels and its VAE gives "
            f"{vae.config.latent_channels}: models for inpainting and the like are not supported"
        )
    classes = _classes(denoiser, home, null_class) if kind == "class" else None
    return Pretrained(
        folder=folder,
        denoiser=denoiser.to(device).eval(),
        denoiser_folder=place,
        scheduler=scheduler,
        kind=kind,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        classes=classes,
        id2label=_id2label(index, classes),
        pipeline=None if index is None else named_class(index),
        variant=weights.variant,
        names=frozenset(denoiser.state_dict()),
    )


def _find(path: str | Path) -> Path:
    folder = user_path(path)
    if folder.is_dir():
        return folder
    if folder.is_file():
        what = "a checkpoint in pickle form, which may run code" if folder.suffix.lower() in _PICKLES else "a file"
        raise InputError(f"{folder} is {what}, and a folder in diffusers' layout is needed: {how_to_convert(folder)}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        from huggingface_hub import snapshot_download

        with contextlib.suppress(Exception):  # not in the cache, for whatever reason
            return Path(snapshot_download(str(path), local_files_only=True))
    raise InputError(f"there is no folder {path}, and no model of that name in the local hub cache: download it first")


def _check_is_whole(folder: Path, place: str, index: Mapping[str, Any] | None, kind: str) -> None:
    """Whether the denoiser is all that the folder needs, and all of it lies in the folder."""
    parts = sorted({place, "scheduler", *_COMPONENTS, *_keys(index or {})} - {""})
    files = {_INDEX, "config.json", "scheduler_config.json"}
    weights = set() if place else {name for name in os.listdir(folder) if _is_weights(PurePosixPath(name))}
    check_links(folder, sorted({*parts} | files | weights))
    check_adapter_files(folder, *(folder / part for part in parts))
    if index is not None:
        check_components(folder, index, kind)
    elif not place and (folder.parent / _INDEX).is_file():  # a part of a pipeline by itself
        pipeline = read_config(folder.parent / _INDEX)
        if folder.name in _keys(pipeline):
            check_components(folder.parent, pipeline, kind)
    for name in ("vqvae", "movq"):
        if index is None and (folder / name).is_dir():
            check_components(folder, {name: ["diffusers", "VQModel"]}, kind)


def _keys(index: Mapping[str, Any]) -> list[str]:
    """Folders of a pipeline's parts."""
    return [key for key in index if _named(index, key)[1] is not None]


def _named(index: Mapping[str, Any], key: str) -> tuple[str | None, str | None]:
    """Library and class of a component."""
    value = index.get(key)
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(part, str) for part in value):
        return None, None
    return value[0], value[1]


def _denoiser_of_pipeline(folder: Path, index: Mapping[str, Any]) -> tuple[str, str]:
    for place in ("transformer", "unet"):
        library, name = _named(index, place)
        if name is None:
            continue
        if library != "diffusers" or name not in _DENOISERS:
            break
        if _named(index, "text_encoder_2")[1] is not None:
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
    pickled = [entry for entry in sorted(folder.iterdir()) if entry.suffix.lower() in _PICKLES]
    if pickled:
        raise InputError(
            f"{folder} holds {pickled[0].name}, a checkpoint in pickle form, which may run code: "
            f"{how_to_convert(pickled[0])}"
        )
    raise InputError(f"{folder} is no diffusers folder: it has neither {_INDEX} nor a model's config.json")


def _component(folder: Path, index: Mapping[str, Any] | None, key: str, *, needed: bool) -> Path | None:
    home = folder / key
    there = home.is_dir() and any(home.iterdir())
    if index is not None and not needed:
        return home if there and _named(index, key)[1] is not None else None
    if needed and (not there or _named(index or {}, key)[1] is None):
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


def _id2label(index: Mapping[str, Any] | None, classes: Classes | None) -> dict[int, str]:
    """Of a DiTPipeline's ``model_index.json``."""
    given = (index or {}).get("id2label")
    if classes is None or not isinstance(given, dict):
        return {}
    labels = {whole_number(key): text for key, text in given.items() if isinstance(text, str)}
    return {key: labels[key] for key in range(classes.count) if key in labels}


# --- Writing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a result folder will hold.

    Attributes:
        copied: files of the source, byte for byte, relative to it.
        left_out: others, and why: whatever may hold the weights as they were before.
        copied_bytes, denoiser_bytes: their sizes.
    """

    copied: tuple[str, ...]
    left_out: dict[str, str]
    copied_bytes: int
    denoiser_bytes: int

    @property
    def bytes(self) -> int:
        return self.copied_bytes + self.denoiser_bytes


def plan_result(source_folder: str | Path, pretrained: Pretrained, extra_files: Iterable[str] = ()) -> Plan:
    """What :func:`write_result` copies from the source, and what it leaves out."""
    extra_files = set(extra_files)
    source, place = user_path(source_folder), pretrained.denoiser_folder
    components = _components(source, pretrained)
    copied: list[str] = []
    left_out: dict[str, str] = {}
    old: set[tuple[int, int]] = set()  # files that hold weights of the denoiser, under whatever name
    for name, elsewhere in _files(source):
        path = PurePosixPath(name)
        top = path.parts[0] if len(path.parts) > 1 else ""
        if elsewhere:
            left_out[name] = "a link that leaves the model's folder"
        elif _is_weights(path) and top not in components:
            if top == place:
                left_out[name] = "the denoiser's weights as they were"
            else:
                left_out[name] = "weights outside the pipeline's parts, which may hold what was forgotten"
            old.add(_identity(source / name))
        elif name in extra_files:
            left_out[name] = "replaced by a file of this result"
        else:
            copied.append(name)
    for name in [name for name in copied if _identity(source / name) in old]:
        copied.remove(name)
        left_out[name] = "the denoiser's weights as they were, by another name"
    size = sum((source / name).stat().st_size for name in copied)
    denoiser = sum(t.numel() * t.element_size() for t in unwrapped(pretrained.denoiser).state_dict().values())
    return Plan(tuple(copied), left_out, size, denoiser)


def _identity(path: Path) -> tuple[int, int]:
    """The same for a file, its links and its hard links."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_weights(path: PurePosixPath) -> bool:
    name = path.name.lower()
    return name.endswith(_WEIGHTS) or _WEIGHTS_INDEX.search(name) is not None


def _files(source: Path) -> Iterator[tuple[str, bool]]:
    """Sorted, relative to ``source``, links within it followed: a hub cache is made of them. Whether it is a link, of a
    file or of a folder as a whole, that leads elsewhere."""
    seen: set[str] = set()
    for folder, below, files in os.walk(source, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if name not in _NOT_OF_THE_MODEL)
        for name in sorted((*below, *files)):
            path = Path(folder, name)
            if leaves(path, source):
                yield path.relative_to(source).as_posix(), True
            elif name not in below:
                if not path.is_file():
                    raise InputError(f"{path} is a link to nothing, or no file: download the model anew")
                yield path.relative_to(source).as_posix(), False
        below[:] = [name for name in below if not leaves(Path(folder, name), source)]


def check_output(output_folder: str | Path, source_folder: str | Path) -> Path:
    """Whether a result can be written there; called before a run, so that none is lost.

    Raises:
        InputError: the folder is not empty, lies in the source, or cannot be written.
    """
    output, source = user_path(output_folder), user_path(source_folder).resolve()
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: choose another output folder")
    if source == output.resolve() or source in output.resolve().parents:
        raise InputError(f"{output} lies in the folder of the model that is read: choose another output folder")
    if output.is_dir() and not all(map(is_leftover, output.iterdir())):
        raise InputError(f"{output} is not empty: choose another output folder, nothing is overwritten")
    above = next(parent for parent in output.absolute().parents if parent.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {above}: choose another output folder")
    return output


def write_result(
    source_folder: str | Path,
    pretrained: Pretrained,
    output_folder: str | Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    extra_files: Mapping[str, bytes | str | Path] | None = None,
    max_shard_size: str | int = "10GB",
) -> Plan:
    """Writes a folder like the source, in which the denoiser's weights are those of ``pretrained.denoiser``.

    It opens as the source does. All other files are the source's, byte for byte, the denoiser's ``config.json`` too;
    weights of other formats, variants or checkpoints that lie beside the pipeline's parts are left out, for they hold
    the model as it was. The folder is whole or not there.

    Args:
        weights: by parameter name: saved in place of the denoiser's own, such as a moving average.
        extra_files: name -> content, or a file to be copied: a result's report, pictures, mask. They replace those of
            a source that is a result itself, but no file of the model.

    Returns:
        What was copied and what was left out.

    Raises:
        InputError: the output is not empty, the denoiser's tensors are not those that were opened, the disk is full.
    """
    source, model = user_path(source_folder), unwrapped(pretrained.denoiser)
    output = check_output(output_folder, source)
    extra = _checked_extra(source, pretrained, extra_files or {})
    plan = plan_result(source, pretrained, extra)
    state = _state(pretrained, weights)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(output) as partial:
            with _state_dict_of(model, state):
                model.save_pretrained(
                    partial / pretrained.denoiser_folder,
                    safe_serialization=True,
                    variant=pretrained.variant,
                    max_shard_size=max_shard_size,
                )
            follow_umask(partial)
            for name in plan.copied:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                _copy(source / name, partial / name)
            for name, content in extra.items():
                target = partial / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Path):
                    _copy(content, target)
                else:
                    target.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise InputError(
            f"{output} cannot be written ({error.strerror or error}): {plan.bytes:,} bytes are needed; nothing was left"
        ) from None
    return plan


def _copy(source: Path, target: Path) -> None:
    """With its mode, but for what lets a program run as somebody else."""
    shutil.copyfile(source, target)
    target.chmod(source.stat().st_mode & 0o777)


def _checked_extra(
    source: Path, pretrained: Pretrained, extra: Mapping[str, bytes | str | Path]
) -> dict[str, bytes | str | Path]:
    own = {pretrained.denoiser_folder, *_components(source, pretrained)} - {""}
    for name, content in extra.items():
        path = PurePosixPath(name)
        model = path.parts[:1] and path.parts[0] in own
        model = model or path.name.startswith("diffusion_pytorch_model")
        model = model or name in (_INDEX, "config.json", "scheduler_config.json")
        if model or path.is_absolute() or ".." in path.parts or not path.parts:
            raise InputError(f"the extra file {name!r} would stand in place of the model's own: give it another name")
        if isinstance(content, Path) and not content.is_file():
            raise InputError(f"there is no file {content} to be put into the result")
    return dict(extra)


def _components(source: Path, pretrained: Pretrained) -> set[str]:
    """Folders of a pipeline's other parts."""
    index = read_config(source / _INDEX) if (source / _INDEX).is_file() else None
    names = _COMPONENTS if index is None else [key for key in index if _named(index, key)[1] is not None]
    return {name for name in names if name != pretrained.denoiser_folder}


def _state(pretrained: Pretrained, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Every tensor in memory of its own: safetensors refuse those that share it, as tied embedders do."""
    model = unwrapped(pretrained.denoiser)
    named = own_names(model.state_dict(keep_vars=True).items())
    if pretrained.names and named.keys() != pretrained.names:
        name = min(named.keys() ^ pretrained.names)
        raise InputError(
            f"the denoiser has other tensors than the model that was opened ({name}): remove adapters or "
            "parametrizations, or merge them"
        )
    given = {}
    for name, value in own_names((weights or {}).items()).items():
        if name not in named or named[name].shape != value.shape:
            raise InputError(f"weights: the denoiser has no {name} of shape {list(value.shape)}")
        given[id(named[name])] = value  # a tied one goes by the first of its names
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, own in named.items():
        value = given.get(id(own), own).detach().to(own.dtype).contiguous()
        state[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return state


@contextlib.contextmanager
def _state_dict_of(model: nn.Module, state: dict[str, Tensor]) -> Iterator[None]:
    """What ``save_pretrained`` is to take for the model's state."""
    model.state_dict = lambda *args, **kwargs: state
    try:
        yield
    finally:
        del model.state_dict
