"""Opens a folder in diffusers' layout, names its denoiser, and writes a folder in which only that one differs."""

from __future__ import annotations

import contextlib
import json
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
from ..data.labels import label_names, parse_classes
from ..errors import InputError, first_line

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
_WEIGHTS_INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")
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
        variant: of the denoiser's weight files, such as ``fp16``.
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

    Only safetensors are read, nothing is downloaded, and no code of the folder runs. A name such as
    ``facebook/DiT-XL-2-256`` means the copy in the local hub cache, if there is one.

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
    index = _json(folder / _INDEX) if (folder / _INDEX).is_file() else None
    if index is not None:
        place, name = _denoiser_of_pipeline(folder, index)
    else:
        place, name = _denoiser_of_folder(folder)
    home = folder / place
    kind = _DENOISERS[name][1]
    variant = _variant(home, "diffusion_pytorch_model", "denoiser")
    config = _json(home / "config.json")
    if config.get("addition_embed_type") is not None:
        raise InputError(f"{folder} takes more than one prompt embedding (SDXL and its like): only Stable Diffusion 1 "
                         "and 2 are supported")  # fmt: skip
    scheduler = _open_scheduler(folder, place, index)
    vae_home = _component(folder, index, "vae", needed=index is not None and ("vae" in index or kind == "text"))
    vae = text_encoder = tokenizer = None
    if vae_home is not None:
        vae = _frozen(_open_model("AutoencoderKL", vae_home, "VAE", dtype), device)
    if kind == "text":
        needed = index is not None
        encoder_home = _component(folder, index, "text_encoder", needed=needed)
        tokenizer_home = _component(folder, index, "tokenizer", needed=needed)
        if encoder_home is not None:
            text_encoder = _frozen(_open_text_encoder(encoder_home, dtype), device)
        if tokenizer_home is not None:
            tokenizer = _open_tokenizer(tokenizer_home)
    denoiser = _open_model(_DENOISERS[name][0], home, "denoiser", dtype)
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
        pipeline=None if index is None else index.get("_class_name"),
        variant=variant,
        names=frozenset(denoiser.state_dict()),
    )


def import_diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise ImportError(
            'Diffusion models need diffusers, which is not installed: pip install "unlearn_ext[diffusion]"'
        ) from None
    return diffusers


def _find(path: str | Path) -> Path:
    folder = user_path(path)
    if folder.is_dir():
        return folder
    if folder.is_file():
        if folder.suffix.lower() in _PICKLES:
            raise InputError(
                f"{folder} is a checkpoint in pickle form, which may run code: convert it to a folder, where you trust "
                "it, with diffusers' from_single_file(...).save_pretrained(...)"
            )
        raise InputError(
            f"{folder} is a file, and a folder in diffusers' layout is needed: convert it with "
            "StableDiffusionPipeline.from_single_file(...).save_pretrained(...)"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        from huggingface_hub import snapshot_download

        with contextlib.suppress(Exception):  # not in the cache, for whatever reason
            return Path(snapshot_download(str(path), local_files_only=True))
    raise InputError(f"there is no folder {path}, and no model of that name in the local hub cache: download it first")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}): it is missing or damaged") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object: it is damaged")
    return content


def _named(index: Mapping[str, Any], key: str) -> tuple[str | None, str | None]:
    """Library and class of a component."""
    value = index.get(key)
    return tuple(value) if isinstance(value, list) and len(value) == 2 else (None, None)


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
        f"{folder} is a {index.get('_class_name', 'pipeline')}, which is not supported: expected a DiTPipeline, a "
        "StableDiffusionPipeline, or a DDPMPipeline with a class-conditional UNet2DModel"
    )


def _denoiser_of_folder(folder: Path) -> tuple[str, str]:
    for place in ("", "transformer", "unet"):
        config = folder / place / "config.json"
        if not config.is_file():
            continue
        name = _json(config).get("_class_name")
        if name in _DENOISERS:
            return place, name
        what = "no model of diffusers" if name is None else f"a {name}"
        raise InputError(f"{folder / place} holds {what}: expected {', '.join(dict.fromkeys(_DENOISERS))}")
    pickled = [entry.name for entry in sorted(folder.iterdir()) if entry.suffix.lower() in _PICKLES]
    if pickled:
        raise InputError(
            f"{folder} holds {pickled[0]}, a checkpoint in pickle form, which may run code: convert it to a folder, "
            "where you trust it, with diffusers' from_single_file(...).save_pretrained(...)"
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


def _open_scheduler(folder: Path, place: str, index: Mapping[str, Any] | None) -> Any:
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
    config = _json(home / "scheduler_config.json")
    name = _named(index or {}, "scheduler")[1] or config.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise InputError(f"the scheduler of {home} is a {name}, which this diffusers does not have: name another")
    with _as_input_error(home, "scheduler"):
        scheduler = kind.from_pretrained(home, local_files_only=True)
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        raise InputError(
            f"the scheduler of {home}, a {name}, has no alphas_cumprod: expected one of a model that predicts noise, "
            "such as DDPMScheduler"
        )
    return scheduler


def _variant(home: Path, stem: str, what: str) -> str | None:
    """The variant of the safetensors in a model's folder; plain ones come first."""
    if not (home / "config.json").is_file():
        raise InputError(f"the {what} in {home} has no config.json: it is missing or damaged")
    files = sorted(entry.name for entry in home.iterdir())
    if f"{stem}.safetensors" in files or f"{stem}.safetensors.index.json" in files:
        return None
    whole = re.compile(rf"{stem}\.([\w-]+?)\.safetensors|{stem}\.safetensors\.index\.([\w-]+)\.json")
    variants = sorted({match[1] or match[2] for name in files if (match := whole.fullmatch(name))})
    if len(variants) == 1:
        return variants[0]
    if variants:
        raise InputError(f"{home} has weights in the variants {' and '.join(variants)}: keep one, or a plain file")
    pickled = [name for name in files if name.endswith(_PICKLES)]
    if pickled:
        raise InputError(
            f"the {what} in {home} has weights in pickle form only ({pickled[0]}), which may run code: convert them, "
            "where you trust them, with from_pretrained(..., use_safetensors=False).save_pretrained(...)"
        )
    raise InputError(f"the {what} in {home} has no weights: expected {stem}.safetensors")


def _open_model(name: str, home: Path, what: str, dtype: torch.dtype) -> nn.Module:
    kind = getattr(import_diffusers(), name)
    given = _json(home / "config.json").get("_class_name") if (home / "config.json").is_file() else name
    if given != name and _DENOISERS.get(str(given), ("",))[0] != name:
        raise InputError(f"the {what} in {home} is a {given}: expected {name}")
    variant = _variant(home, "diffusion_pytorch_model", what)
    with _as_input_error(home, what):
        model, info = kind.from_pretrained(
            home,
            variant=variant,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    _whole(home, what, info)
    return model


def _open_text_encoder(home: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import CLIPTextModel

    variant = _variant(home, "model", "text encoder")
    architectures = _json(home / "config.json").get("architectures")
    if architectures and "CLIPTextModel" not in architectures:
        raise InputError(f"the text encoder in {home} is a {architectures[0]}: expected CLIPTextModel")
    with _as_input_error(home, "text encoder"):
        model, info = CLIPTextModel.from_pretrained(
            home, variant=variant, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    _whole(home, "text encoder", info)
    return model


def _open_tokenizer(home: Path) -> Any:
    from transformers import CLIPTokenizer

    with _as_input_error(home, "tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(home, local_files_only=True)
    if len(tokenizer) < 3:  # transformers makes one of the special tokens alone where the vocabulary is missing
        raise InputError(f"the tokenizer in {home} has no vocabulary: add its vocab.json and merges.txt")
    return tokenizer


@contextlib.contextmanager
def _as_input_error(home: Path, what: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"the {what} in {home} cannot be opened ({first_line(error)})") from None


def _whole(home: Path, what: str, info: Mapping[str, Any]) -> None:
    """diffusers and transformers would go on with random numbers in place of what is missing."""
    for key, problem in (("missing_keys", "lack"), ("mismatched_keys", "do not fit in")):
        names = sorted(str(name) for name in info.get(key) or ())
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"the weights of the {what} in {home} {problem} {names[0]}{more}: get the whole file")


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
    labels = {int(key): str(text) for key, text in given.items() if str(key).isdecimal()}
    return {key: labels[key] for key in sorted(labels) if key < classes.count}


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
    copied, left_out, size = [], {}, 0
    inside = _roots(source)
    for name in _files(source, inside):
        path = PurePosixPath(name)
        top = path.parts[0] if len(path.parts) > 1 else ""
        if _is_weights(path) and top not in components:
            if top == place:
                left_out[name] = "the denoiser's weights as they were"
            else:
                left_out[name] = "weights outside the pipeline's parts, which may hold what was forgotten"
        elif not _is_inside(source / name, inside):
            if path.parts[0] in {*components, place} or name in (_INDEX, "config.json", "scheduler_config.json"):
                raise InputError(
                    f"{source / name} is a link that leaves the model's folder, and the result needs what it points "
                    "to: put the file itself there"
                )
            left_out[name] = "a link that leaves the model's folder"
        elif name in extra_files:
            left_out[name] = "replaced by a file of this result"
        else:
            copied.append(name)
            size += (source / name).stat().st_size
    denoiser = sum(t.numel() * t.element_size() for t in unwrapped(pretrained.denoiser).state_dict().values())
    return Plan(tuple(copied), left_out, size, denoiser)


def _is_weights(path: PurePosixPath) -> bool:
    name = path.name.lower()
    return name.endswith(_WEIGHTS) or _WEIGHTS_INDEX.search(name) is not None


def _roots(source: Path) -> tuple[Path, ...]:
    """Where a model's files may lie: in its folder, or, in a hub cache, in the blobs that a snapshot links to."""
    real = source.resolve()
    snapshot = next((path for path in (real, *real.parents) if path.parent.name == "snapshots"), None)
    return (real,) if snapshot is None else (real, snapshot, snapshot.parent.parent / "blobs")


def _is_inside(path: Path, roots: Iterable[Path]) -> bool:
    real = path.resolve()
    return any(root in real.parents for root in roots)


def _files(source: Path, roots: Iterable[Path]) -> Iterator[str]:
    """Sorted, relative to ``source``. Links are followed within ``roots``; a folder elsewhere is named as one file."""
    seen: set[str] = set()
    for folder, below, files in os.walk(source, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if name not in _NOT_OF_THE_MODEL)
        for name in [name for name in below if not _is_inside(Path(folder, name), roots)]:
            below.remove(name)
            yield Path(folder, name).relative_to(source).as_posix()
        for name in sorted(files):
            path = Path(folder, name)
            if not path.is_file():
                raise InputError(f"{path} is a link to nothing, or no file: download the model anew")
            yield path.relative_to(source).as_posix()


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
    index = _json(source / _INDEX) if (source / _INDEX).is_file() else None
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
